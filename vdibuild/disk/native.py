"""File systems straight into a disk image: no root, no mount, no loop device, no appliance.

Every tool here writes a plain file. What has its own way of writing at an offset does that; the others
make a sparse file of their own, whose data is then copied into the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from vdibuild import process, progress, unsynced
from vdibuild.disk import mkfs
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.errors import CommandError, HostError, VdibuildError
from vdibuild.tree import Tree, host_command

_MIB = 1 << 20
_SECTORS_PER_MIB = 2048

_INODES = ("Inode count", "Free inodes")
_ROOT_INODE, _FIRST_INODE = 2, 11  # EXT4_ROOT_INO and, of a new file system, lost+found

_FULL = ("No space left on device", "Could not allocate block", "Disk full", "no free space")


def write_table(layout: Layout, disk: Path, *, sync: bool = True) -> None:
    """Write the partition table to a raw image of the layout's size. sync: on the disk itself, too."""
    argv = ["sfdisk", "--quiet", "--wipe", "never", "--no-reread", "--no-tell-kernel", str(disk)]
    if sync:
        process.run(argv, stdin=table_script(layout))
        return
    with unsynced.sandboxed(argv) as (sandboxed, descriptors):
        process.run(sandboxed, stdin=table_script(layout), pass_fds=descriptors)


def table_script(layout: Layout) -> str:
    """The partition table as a script for sfdisk(8)."""
    lines = [f"label: {'gpt' if layout.table == 'gpt' else 'dos'}", f"label-id: {layout.identifier}"]
    lines += ["unit: sectors", ""]
    for partition in layout.partitions:
        start, size = partition.start * _SECTORS_PER_MIB, partition.size * _SECTORS_PER_MIB
        line = f"partition{partition.number}: start={start}, size={size}, type={partition.type}"
        if layout.table == "gpt":
            line += f", uuid={partition.uuid}"
            line += f', name="{partition.name}"' if partition.name else ""
            line += f', attrs="{partition.attributes}"' if partition.attributes else ""
        elif partition is layout.holding("/boot")[0]:
            line += ", bootable"  # some firmware starts nothing without it
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def handles(place: Partition | LogicalVolume) -> bool:
    """Whether this is a partition that `write_partition` can make."""
    return (
        isinstance(place, Partition) and isinstance(place.holds, FileSystem) and place.holds.kind in _WRITERS
    )


def write_partition(tree: Tree, layout: Layout, partition: Partition, disk: Path, scratch: Path) -> None:
    """Make a partition's file system, and fill it from the tree.

    disk: a raw image with its table. scratch: a directory for temporary files, on the disk's file system.
    Raises VdibuildError when the tree does not fit, HostError when the host's own file system is full.
    """
    fs = partition.holds
    if not isinstance(fs, FileSystem):
        raise TypeError(f"partition {partition.number} holds no file system")
    try:
        with progress.step(f"{fs.kind} for {fs.mountpoint}"):
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


def masked(tree: Tree, hidden: Iterable[FileSystem], argv: Sequence[str], scratch: Path) -> list[str]:
    """A command that sees the tree as it is, but the mount points of the hidden file systems empty.

    scratch: a directory that gets the empty directories to show there.
    """
    sandbox = ["bwrap", "--dev-bind", "/", "/", "--cap-add", "ALL", "--die-with-parent"]
    for fs in hidden:
        mountpoint = tree.make_directory(fs.mountpoint)
        empty = scratch / f"empty{fs.mountpoint.replace('/', '-')}"
        empty.mkdir(exist_ok=True)
        shutil.copystat(mountpoint, empty)
        sandbox += ["--ro-bind", str(empty), str(mountpoint)]
    return host_command([*sandbox, "--", *argv])


def below(layout: Layout, fs: FileSystem) -> list[FileSystem]:
    """The file systems that are mounted somewhere below this one, but not below another of them."""
    result: list[FileSystem] = []
    for _, other in layout.mounts:
        path = PurePosixPath(other.mountpoint)
        hidden = any(path.is_relative_to(nearer.mountpoint) for nearer in result)
        if other is not fs and path.is_relative_to(fs.mountpoint) and not hidden:
            result.append(other)
    return result


def place(source: Path, disk: Path, offset: int, start: int = 0, length: int | None = None) -> None:
    """Copy the data of a sparse file to an offset (in bytes) of a disk image; its holes stay holes there.

    start, length: the part of the file, in bytes; by default all of it.
    """
    copy = _copy_range if disk.is_block_device() else os.copy_file_range
    with source.open("rb") as reader, disk.open("r+b") as writer:
        size = reader.seek(0, os.SEEK_END) if length is None else start + length
        position = start
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return
            end = min(size, os.lseek(reader.fileno(), position, os.SEEK_HOLE))
            while position < end:
                position += copy(
                    reader.fileno(), writer.fileno(), end - position, position, offset + position - start
                )


def _copy_range(source: int, target: int, count: int, start: int, offset: int) -> int:
    """What copy_file_range(2) does, for a block device, which it does not write to."""
    return os.pwrite(target, os.pread(source, min(count, _MIB), start), offset)


def _write_ext4(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    source = tree.make_directory(fs.mountpoint)
    offset = partition.start * _MIB
    argv = mkfs.ext4(fs, disk, offset=offset, size=partition.size, source=source)
    process.run(masked(tree, below(layout, fs), argv, scratch), env=_reproducible())
    _finish_ext4(source, f"{disk}?offset={offset}")


def _finish_ext4(source: Path, image: str) -> None:
    """Set what mke2fs leaves out: the mode, owner and time of its root; and times that tell of the build.

    source: the directory the file system was filled from. image: the file system as e2fsprogs names it.
    """
    stat = host_command(["stat", "--format", "%f %u %g %Y", str(source)])
    mode, user, group, changed = process.run(stat, capture=True).stdout.split()
    commands = [f"/ mode 0{int(mode, 16):o}", f"/ uid {user}", f"/ gid {group}", f"/ mtime @{changed}"]
    if epoch := process.environment().get("SOURCE_DATE_EPOCH"):
        # Nobody can set a file's ctime, and reading it changes its atime. mke2fs numbers inodes one by one.
        header = process.run(["dumpe2fs", "-h", image], capture=True).stdout
        count, free = (int(re.findall(rf"^{name}: +(\d+)", header, re.M)[0]) for name in _INODES)
        numbers = (_ROOT_INODE, *range(_FIRST_INODE, count - free + 1))
        commands += [f"<{number}> {time} @{epoch}" for number in numbers for time in ("atime", "ctime")]
    script = "".join(f"set_inode_field {command}\n" for command in commands)
    process.run(["debugfs", "-w", "-f", "-", image], stdin=script, capture=True, env=_reproducible())


def _write_btrfs(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    with _own_file(partition, disk, scratch) as image:
        argv = mkfs.btrfs(fs, image, source=tree.make_directory(fs.mountpoint))
        process.run(masked(tree, below(layout, fs), argv, scratch))
        if image.stat().st_size != partition.size * _MIB:
            # mkfs.btrfs writes holes as zeros, and takes the room it needs.
            raise VdibuildError(
                f"what belongs on {fs.mountpoint} does not fit into its {partition.size} MiB",
                "files with large holes need room for all of it on a btrfs that is made from a directory",
            )


def _write_vfat(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    source = tree.make_directory(fs.mountpoint)
    for directory, names, files in os.walk(source):
        for name in (*names, *files):
            # mcopy would follow it, out of the tree
            if (Path(directory) / name).is_symlink():
                raise VdibuildError(f"{directory}/{name} is a symbolic link, which FAT cannot hold")
    with _own_file(partition, disk, scratch) as image:
        process.run(mkfs.vfat(fs, image, partition.size))
        entries = sorted(str(entry) for entry in source.iterdir())
        if entries:
            copy = ["mcopy", "-i", str(image), "-s", "-m", "-Q", *entries, "::/"]
            process.run(host_command(copy), env={"MTOOLSRC": "/dev/null"})


def _write_swap(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    with _own_file(partition, disk, scratch) as image:
        process.run(mkfs.swap(fs, image))


def _write_nothing(
    tree: Tree, layout: Layout, partition: Partition, fs: FileSystem, disk: Path, scratch: Path
) -> None:
    """A partition without a file system: the boot loader's own place, or a container of partitions."""


_WRITERS: dict[str, Callable[[Tree, Layout, Partition, FileSystem, Path, Path], None]] = {
    "ext4": _write_ext4,
    "btrfs": _write_btrfs,
    "vfat": _write_vfat,
    "swap": _write_swap,
    "biosboot": _write_nothing,
    "extended": _write_nothing,
}


@contextlib.contextmanager
def _own_file(partition: Partition, disk: Path, scratch: Path) -> Iterator[Path]:
    """A sparse file of the partition's size; what the block puts into it goes onto the disk."""
    image = scratch / f"partition-{partition.number}"
    with image.open("wb") as file:
        file.truncate(partition.size * _MIB)
    image.chmod(0o600)  # mkswap warns of anything else
    yield image
    place(image, disk, partition.start * _MIB)
    image.unlink()


def _reproducible() -> dict[str, str]:
    """The environment in which mke2fs knows only the build's own time, and no configuration of the host."""
    env = {"MKE2FS_CONFIG": "/dev/null"}
    if epoch := process.environment().get("SOURCE_DATE_EPOCH"):
        env["E2FSPROGS_FAKE_TIME"] = epoch
    return env
