"""File systems straight into a disk image: no root, no mount, no loop device, no appliance.

Every tool here writes a plain file. What has its own way of writing at an offset does that; the others
make a sparse file of their own, whose data is then copied into the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from vdibuild import process
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.errors import CommandError, HostError, VdibuildError
from vdibuild.tree import Tree, host_command

_MIB = 1 << 20
_SECTORS_PER_MIB = 2048

# Named one by one, so that the host's mke2fs.conf has no say: whatever a newer mke2fs would add by itself
# (metadata_csum_seed, orphan_file), GRUB 2.06 or a 5.10 kernel may not be able to read.
_EXT4_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
_BTRFS_FEATURES = "extref,skinny-metadata,no-holes"
_FAT32_SMALLEST = 64
"""MiB from which the EFI system partition is FAT32, as the UEFI specification (13.3) wants it."""

_FULL = ("No space left on device", "Could not allocate block", "Disk full", "no free space")


def write_table(layout: Layout, disk: Path) -> None:
    """Write the partition table to a raw image of the layout's size."""
    process.run(
        ["sfdisk", "--quiet", "--wipe", "never", "--no-reread", "--no-tell-kernel", str(disk)],
        stdin=table_script(layout),
    )


def table_script(layout: Layout) -> str:
    """The partition table as a script for sfdisk(8)."""
    lines = [f"label: {'gpt' if layout.table == 'gpt' else 'dos'}", f"label-id: {layout.identifier}"]
    lines += ["unit: sectors", ""]
    for partition in layout.partitions:
        start, size = partition.start * _SECTORS_PER_MIB, partition.size * _SECTORS_PER_MIB
        line = f"start={start}, size={size}, type={partition.type}"
        if layout.table == "gpt":
            line += f", uuid={partition.uuid}"
        elif partition is layout.holding("/boot")[0]:
            line += ", bootable"  # some firmware starts nothing without it
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def handles(partition: Partition) -> bool:
    """Whether `write_partition` can make what is on this partition."""
    return isinstance(partition.holds, FileSystem) and partition.holds.kind in _WRITERS


def write_partition(tree: Tree, layout: Layout, partition: Partition, disk: Path, scratch: Path) -> None:
    """Make a partition's file system, and fill it from the tree.

    disk: a raw image with its table. scratch: a directory for temporary files, on the disk's file system.
    Raises VdibuildError when the tree does not fit, HostError when the host's own file system is full.
    """
    fs = partition.holds
    if not isinstance(fs, FileSystem):
        raise TypeError(f"partition {partition.number} holds no file system")
    try:
        _WRITERS[fs.kind](tree, layout, partition, fs, disk, scratch)
    except CommandError as error:
        if not any(sign in line for sign in _FULL for line in error.tail):
            raise
        if shutil.disk_usage(scratch).free < 16 * _MIB:
            raise HostError(f"no space left in {disk.parent}", "free some space, then run again") from error
        raise VdibuildError(
            f"what belongs on {fs.mountpoint} does not fit into its {partition.size} MiB",
            "make the disk or the volume larger, or install less",
        ) from error


def masked(tree: Tree, layout: Layout, fs: FileSystem, argv: Sequence[str], scratch: Path) -> list[str]:
    """A command that sees the tree as it is, but every other file system's mount point empty.

    fs: the file system whose own content the command is to read. scratch: gets the empty directories.
    """
    sandbox = ["bwrap", "--dev-bind", "/", "/", "--cap-add", "ALL", "--die-with-parent"]
    for _, other in layout.mounts:
        below = PurePosixPath(other.mountpoint).is_relative_to(PurePosixPath(fs.mountpoint))
        if other is fs or not below:
            continue
        mountpoint = tree.make_directory(other.mountpoint)
        empty = scratch / f"empty{other.mountpoint.replace('/', '-')}"
        empty.mkdir(exist_ok=True)
        shutil.copystat(mountpoint, empty)
        sandbox += ["--ro-bind", str(empty), str(mountpoint)]
    return host_command([*sandbox, "--", *argv])


def place(source: Path, disk: Path, offset: int) -> None:
    """Copy the data of a sparse file to an offset (in bytes) of a disk image; its holes stay holes there."""
    with source.open("rb") as reader, disk.open("r+b") as writer:
        size = reader.seek(0, os.SEEK_END)
        position = 0
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return
            end = os.lseek(reader.fileno(), position, os.SEEK_HOLE)
            while position < end:
                position += os.copy_file_range(
                    reader.fileno(), writer.fileno(), end - position, position, offset + position
                )


def _write_ext4(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    extended = [
        f"offset={partition.start * _MIB}",
        f"hash_seed={fs.uuid}",
        # The image is a new file, all zeros: nothing to discard, and no inode table for the guest to zero.
        "nodiscard,assume_storage_prezeroed=1,lazy_itable_init=0,lazy_journal_init=1",
    ]
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-O", _EXT4_FEATURES]
    argv += ["-U", fs.uuid, "-L", fs.label, "-E", ",".join(extended)]
    argv += ["-d", str(tree.make_directory(fs.mountpoint)), str(disk), f"{partition.size}M"]
    process.run(masked(tree, layout, fs, argv, scratch), env=_reproducible())


def _write_btrfs(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    image = _sparse(scratch / f"partition-{partition.number}", partition)
    argv = ["mkfs.btrfs", "-q", "-U", fs.uuid, "-O", _BTRFS_FEATURES]
    argv += ["-L", fs.label] if fs.label else []
    argv += ["--rootdir", str(tree.make_directory(fs.mountpoint)), str(image)]
    process.run(masked(tree, layout, fs, argv, scratch))
    place(image, disk, partition.start * _MIB)
    image.unlink()


def _write_vfat(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    image = _sparse(scratch / f"partition-{partition.number}", partition)
    width = "32" if partition.size >= _FAT32_SMALLEST else "16"
    argv = ["mkfs.vfat", "-F", width, "-i", fs.uuid.replace("-", ""), "--invariant"]
    argv += ["-n", fs.label] if fs.label else []
    process.run([*argv, str(image)])
    source = tree.make_directory(fs.mountpoint)
    for directory, names, files in os.walk(source):
        for name in (*names, *files):
            # mcopy would follow it, out of the tree
            if (Path(directory) / name).is_symlink():
                raise VdibuildError(f"{directory}/{name} is a symbolic link, which FAT cannot hold")
    entries = sorted(str(entry) for entry in source.iterdir())
    if entries:
        copy = ["mcopy", "-i", str(image), "-s", "-m", "-Q", *entries, "::/"]
        process.run(masked(tree, layout, fs, copy, scratch), env={"MTOOLSRC": "/dev/null"})
    place(image, disk, partition.start * _MIB)
    image.unlink()


def _write_swap(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    image = _sparse(scratch / f"partition-{partition.number}", partition)
    argv = ["mkswap", "--uuid", fs.uuid]
    argv += ["--label", fs.label] if fs.label else []
    process.run([*argv, str(image)])
    place(image, disk, partition.start * _MIB)
    image.unlink()


def _write_nothing(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    """A BIOS boot partition: the boot loader's own place."""


_WRITERS: dict[str, Callable[[Tree, Layout, Partition, FileSystem, Path, Path], None]] = {
    "ext4": _write_ext4,
    "btrfs": _write_btrfs,
    "vfat": _write_vfat,
    "swap": _write_swap,
    "biosboot": _write_nothing,
}


def _sparse(image: Path, partition: Partition) -> Path:
    with image.open("wb") as file:
        file.truncate(partition.size * _MIB)
    image.chmod(0o600)
    return image


def _reproducible() -> dict[str, str]:
    """The environment in which mke2fs knows only the build's own time, and no configuration of the host."""
    env = {"MKE2FS_CONFIG": "/dev/null"}
    if epoch := process.environment().get("SOURCE_DATE_EPOCH"):
        env["E2FSPROGS_FAKE_TIME"] = epoch
    return env
