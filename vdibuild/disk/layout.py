"""Plans a disk: partitions, volumes and file systems with their UUIDs, decided before anything is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileSystem:
    """A file system or swap area to make.

    kind: ext4, xfs, btrfs, vfat, swap, or biosboot for a partition without one.
    mountpoint: a path, or `swap`. uuid: as blkid prints it (vfat: XXXX-XXXX).
    """

    kind: str
    uuid: str
    mountpoint: str
    label: str = ""
    options: str = ""


@dataclass(frozen=True)
class Partition:
    """A partition. number from 1; start and size in MiB; type: a GPT type GUID, or an MBR type (hex).

    holds: a file system, or the name of the volume group whose physical volume this is.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str
    holds: FileSystem | str


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume; size in MiB."""

    group: str
    name: str
    size: int
    holds: FileSystem


@dataclass(frozen=True)
class Layout:
    """A whole disk. table: gpt or msdos. firmware: bios or uefi. size in MiB. identifier: the GPT's disk
    GUID, or the MBR's 0x-prefixed disk signature. extents: extent size in MiB by volume group.
    """

    table: str
    firmware: str
    size: int
    identifier: str
    partitions: tuple[Partition, ...]
    logical: tuple[LogicalVolume, ...]
    extents: dict[str, int]
