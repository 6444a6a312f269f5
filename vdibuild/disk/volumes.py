"""File systems on block devices: those of the appliance, or of a machine that is installed.

Where a kernel runs that has device-mapper and sees the disk, its tools make them; `Devices` says how they
are run there, and what the disk is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vdibuild.disk import mkfs
from vdibuild.disk.layout import FileSystem, LogicalVolume, Partition, VolumeGroup


class Run(Protocol):
    """Runs a command where the disk is, and returns what it printed; raises when it fails."""

    def __call__(self, argv: Sequence[str]) -> str:
        """Run it."""


@dataclass(frozen=True)
class Devices:
    """A disk that a kernel sees. disk: its device. blank: it holds nothing but zeros."""

    run: Run
    disk: str
    blank: bool

    def path(self, place: Partition | LogicalVolume) -> str:
        """The device of a partition or logical volume."""
        return device(self.disk, place)

    def activate(self, group: VolumeGroup) -> None:
        """Activate a volume group that lvm.write has written."""
        self.run(["vgchange", "--quiet", "--activate", "y", group.name])
        self.run(["udevadm", "settle"])

    def make_file_system(self, place: Partition | LogicalVolume) -> None:
        """Make the file system or swap area that a partition or logical volume is to hold."""
        fs, path = file_system(place), self.path(place)
        if fs.kind == "xfs":
            self.run(mkfs.xfs(fs, path, usage=self.run(["sh", "-c", "mkfs.xfs 2>&1 || true"])))
        elif fs.kind == "ext4":
            self.run(mkfs.ext4(fs, path, blank=self.blank))
        elif fs.kind == "btrfs":
            self.run(mkfs.btrfs(fs, path, blank=self.blank))
        elif fs.kind == "vfat":
            self.run(mkfs.vfat(fs, path, place.size))
        elif fs.kind == "swap":
            self.run(mkfs.swap(fs, path))


def device(disk: str, place: Partition | LogicalVolume) -> str:
    """The device of a partition of `disk`, or of a logical volume."""
    if isinstance(place, LogicalVolume):
        return f"/dev/mapper/{place.mapper}"
    # nvme0n1p1, mmcblk0p1, loop0p1: a name that ends in a digit (block/partitions/core.c in Linux)
    return f"{disk}{'p' if disk[-1].isdigit() else ''}{place.number}"


def file_system(place: Partition | LogicalVolume) -> FileSystem:
    """What a place holds that is known to hold a file system."""
    if not isinstance(place.holds, FileSystem):
        raise TypeError(f"partition {place.number} holds no file system")
    return place.holds
