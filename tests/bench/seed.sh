#!/bin/sh
# A system from a tar archive onto a disk, as fast-provisioning scripts on hypervisors do it by hand: parted, mkfs,
# mkswap, mount, tar, a few files changed, grub. Run by tests/bench/provision.py, as one of those it measures.
#
#     seed.sh BUNDLE DISK DIRECTORY
#
# BUNDLE: a .tar.zst. DISK: a file of the disk's size, which gets a loop device, since the machines this is run on
# have no device-mapper for kpartx. DIRECTORY: an empty one to mount on.
set -eu
bundle=$1 disk=$2 place=$3

loop=$(losetup --find --show "$disk")
root=
cleanup() {
    ! mountpoint -q "$place" || umount "$place"
    [ -z "$root" ] || losetup --detach "$root" "$swap"
    # The kernel keeps the partitions of a loop device without a file, and whoever gets it next stumbles over them.
    partx --delete "$loop"
    losetup --detach "$loop"
}
trap cleanup EXIT

swap_begin=$(( $(stat -c %s "$disk") / 1048576 - 128 ))
parted -s "$loop" mktable msdos
parted -s -- "$loop" mkpart primary ext2 1MiB "${swap_begin}MiB"
parted -s -- "$loop" mkpart primary linux-swap "${swap_begin}MiB" -1s
parted -s "$loop" set 1 boot on
root=$(losetup --find --show --offset 1048576 --sizelimit $(( (swap_begin - 1) * 1048576 )) "$disk")
swap=$(losetup --find --show --offset $(( swap_begin * 1048576 )) "$disk")
mkswap -q "$swap"

mkfs.ext4 -q "$root"
mount "$root" "$place"
tar -C "$place" -xp --zstd --numeric-owner -f "$bundle"
sync -f "$place"

echo bench.example.org >"$place/etc/hostname"
sed -i "s@root=[^ ]\{1,\} @root=/dev/vda1 @" "$place/boot/grub/grub.cfg"
cat >"$place/etc/fstab" <<END
/dev/vda1 / ext4 defaults,noatime 1 1
/dev/vda2 swap swap defaults 0 0
END
grub-install --target=i386-pc --no-floppy --boot-directory="$place/boot" --modules="part_msdos ext2" \
    --skip-fs-probe "$loop"
umount "$place"
sync "$disk"
