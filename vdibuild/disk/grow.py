"""A layout on a larger or smaller disk, and ext4 file systems that take the room they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vdibuild import process, unsynced
from vdibuild.disk.layout import PHYSICAL_VOLUME_HEADER, Layout, LogicalVolume, Partition
from vdibuild.errors import VdibuildError

_MIB = 1 << 20


def resized(layout: Layout, size: int) -> Layout:
    """The layout on a disk of `size` MiB: its last partition is larger or smaller, all else stays.

    Where that is a physical volume, the volume with the root file system changes with it, or else the
    group's largest. Raises VdibuildError when nothing of it would be left.
    """
    last = last_partition(layout)
    end = size - (1 if layout.table == "gpt" else 0)
    partition = replace(last, size=end - last.start)
    partitions = tuple(partition if one is last else one for one in layout.partitions)
    logical = layout.logical
    grown = growing(layout)
    if isinstance(grown, LogicalVolume):
        extent = next(group.extent for group in layout.groups if group.name == grown.group)
        room = sum(
            (one.size - PHYSICAL_VOLUME_HEADER) // extent for one in partitions if one.holds == grown.group
        )
        others = sum(one.size for one in logical if one.group == grown.group and one is not grown)
        logical = tuple(replace(one, size=room * extent - others) if one is grown else one for one in logical)
    result = replace(layout, size=size, partitions=partitions, logical=logical)
    if growing(result).size < 1:
        raise VdibuildError(f"a disk of {size} MiB is too small for the image's partitions")
    return result


def last_partition(layout: Layout) -> Partition:
    """The partition that lies last on the disk."""
    return max(layout.partitions, key=lambda one: one.start)


def growing(layout: Layout) -> Partition | LogicalVolume:
    """What gets a larger disk's room: the last partition, or a logical volume on it."""
    last = last_partition(layout)
    if not isinstance(last.holds, str):
        return last
    volumes = [one for one in layout.logical if one.group == last.holds]
    return max(volumes, key=lambda one: (one.holds.mountpoint == "/", one.size))


def check_ext4(disk: Path, partition: Partition) -> None:
    """Check an ext4 file system, and mend what needs no decision; that is not on the disk itself yet.

    Raises VdibuildError for a damaged one.
    """
    with unsynced.sandboxed(["e2fsck", "-f", "-p", _volume(disk, partition)]) as (argv, descriptors):
        done = process.run(argv, check=False, pass_fds=descriptors)
    if done.status > 1:
        raise VdibuildError(f"the file system of partition {partition.number} is damaged", "build it again")


def grow_ext4(disk: Path, partition: Partition) -> None:
    """Let an ext4 file system fill its partition; that is not on the disk itself yet.

    disk: a raw image or a block device.
    """
    # resize2fs cuts a regular file off where the file system would end if it began at the file's beginning.
    # So it runs where ftruncate(2) does nothing.
    resize = ["resize2fs", _volume(disk, partition), f"{partition.size}M"]
    with unsynced.sandboxed(resize, [_FTRUNCATE]) as (argv, descriptors):
        process.run(argv, pass_fds=descriptors)


_FTRUNCATE = 77
"""Linux: arch/x86/entry/syscalls/syscall_64.tbl."""


def _volume(disk: Path, partition: Partition) -> str:
    return f"{disk}?offset={partition.start * _MIB}"
