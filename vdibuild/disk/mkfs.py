"""The commands that make file systems, with features named so that old and new hosts make the same.

A newer mkfs turns on what GRUB 2.06 or a 5.10 kernel cannot read (mke2fs: metadata_csum_seed,
orphan_file; mkfs.xfs: nrext64, exchange, parent). The sets here are readable by every guest we build: EL 9,
Debian 12, Ubuntu 22.04 and later.
"""

from __future__ import annotations

from pathlib import Path

from vdibuild.disk.layout import FileSystem

_EXT4_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
_BTRFS_FEATURES = "extref,skinny-metadata,no-holes"
_XFS_OFF = {"nrext64": "-i", "exchange": "-i", "rmapbt": "-m", "parent": "-n"}
_FAT32_SMALLEST = 64
"""MiB from which the EFI system partition is FAT32, as the UEFI specification (13.3) asks."""


def ext4(
    fs: FileSystem,
    device: Path | str,
    *,
    offset: int = 0,
    size: int = 0,
    source: Path | None = None,
    blank: bool = True,
) -> list[str]:
    """Make an ext4 file system on a device or in a file.

    offset: in bytes; size: in MiB, by default all there is. source: a directory whose content it gets.
    blank: there are only zeros, so that no inode table has to be zeroed, neither now nor at the first boot.
    """
    extended = f"offset={offset},hash_seed={fs.uuid},nodiscard"
    extended += ",assume_storage_prezeroed=1" if blank else ""
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384"]
    argv += ["-O", _EXT4_FEATURES, "-E", extended, "-U", fs.uuid, "-L", fs.label]
    argv += ["-d", str(source)] if source else []
    return [*argv, str(device), *([f"{size}M"] if size else [])]


def btrfs(fs: FileSystem, device: Path | str, *, source: Path | None = None, blank: bool = True) -> list[str]:
    """Make a btrfs file system on a device or in a file.

    source: a directory whose content it gets. blank: nothing is there that would be overwritten.
    """
    argv = ["mkfs.btrfs", "-q", "-U", fs.uuid, "-O", _BTRFS_FEATURES]
    argv += ["-L", fs.label] if fs.label else []
    argv += ["--rootdir", str(source)] if source else []
    argv += [] if blank else ["--force"]
    return [*argv, str(device)]


def xfs(fs: FileSystem, device: str, usage: str) -> list[str]:
    """Make an XFS file system on a device. usage: what this mkfs.xfs prints about its options.

    A feature that it does not know needs no turning off, and it would refuse the option.
    """
    off = [word for name, option in _XFS_OFF.items() if f"{name}=" in usage for word in (option, f"{name}=0")]
    label = ["-L", fs.label] if fs.label else []
    return ["mkfs.xfs", "-q", "-f", "-K", "-m", f"uuid={fs.uuid}", *off, *label, device]


def vfat(fs: FileSystem, device: Path | str, size: int) -> list[str]:
    """Make a FAT file system on a device or in a file of `size` MiB."""
    argv = ["mkfs.vfat", "--invariant", "-i", fs.uuid.replace("-", "")]
    argv += ["-F", "32"] if size >= _FAT32_SMALLEST else []
    argv += ["-n", fs.label] if fs.label else []
    return [*argv, str(device)]


def swap(fs: FileSystem, device: Path | str) -> list[str]:
    """Make a swap area on a device or in a file."""
    label = ["--label", fs.label] if fs.label else []
    return ["mkswap", "--uuid", fs.uuid, *label, str(device)]
