"""Live systems: a root file system becomes a squashfs, that with a kernel an ISO that boots everywhere."""

ISO = "image.iso"
KERNEL = "vmlinuz"
INITRAMFS = "initrd.img"
"""The files of a live system, in the store as elsewhere; kernel and initramfs are in the ISO, too."""
