"""Plans a disk: partitions, volumes and file systems with their UUIDs, decided before anything is written.

So fstab, the boot menu and the initramfs can be finished in the tree, and the same inputs give the same
disk. All sizes and positions are whole MiB, which is the alignment that partitions are given anyway.
"""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vdibuild.errors import InputError
from vdibuild.recipe import Storage, Volume

FIRST = 1
"""Where the first partition begins (MiB): before it are the table and, with MBR, GRUB's core image."""

PHYSICAL_VOLUME_HEADER = 1
"""What LVM keeps for itself at the beginning of a physical volume (MiB; lvm.conf default_data_alignment)."""

_NAMESPACE = uuid.UUID("8d3c1f0e-52c4-5d0b-9d6a-1f4f3f0c7a11")

# https://uapi-group.org/specifications/specs/discoverable_partitions_specification/
_GPT_LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
_GPT_BY_MOUNTPOINT = {
    "/": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",  # x86-64
    "/usr": "8484680c-9521-48c6-9c11-b0720656f69e",  # x86-64
    "/boot": "bc13c2ff-59e6-4262-a352-b275fd6f7172",
    "/home": "933ac7e1-2eb4-4f13-b844-0e14e2aef915",
    "/srv": "3b8f8425-20e0-4f3b-907f-1a25a76f98e8",
    "/var/tmp": "7ec6f557-3bc5-4aca-b293-16ef5df639d1",  # noqa: S108 (a mount point, not a file)
}
_GPT_BY_KIND = {
    "vfat": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
    "swap": "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
    "lvmpv": "e6d6d379-f507-44c2-a23c-238f2a3df928",
    "biosboot": "21686148-6449-6e6f-744e-656564454649",
}
_MBR_LINUX = "83"
_MBR_BY_KIND = {"vfat": "ef", "swap": "82", "lvmpv": "8e"}
_MBR_PRIMARY = 4

_NO_FILE_SYSTEM = ("biosboot", "extended")
_ESP_MOUNTPOINTS = ("/boot/efi", "/efi")
_LABEL_BYTES = {"ext4": 16, "xfs": 12, "btrfs": 255, "vfat": 11, "swap": 16}
# What each file system needs at least (MiB): mkfs.xfs refuses less than 300, mkfs.btrfs less than 109.
_SMALLEST = {"xfs": 300, "btrfs": 109, "ext4": 8, "vfat": 4, "swap": 1, "biosboot": 1, "lvmpv": 8}


@dataclass(frozen=True)
class FileSystem:
    """A file system or swap area to make.

    kind: ext4, xfs, btrfs, vfat, swap, or for a partition without one biosboot, or extended: the MBR's
    container of the logical partitions. mountpoint: a path, `swap`, or empty for one that is not mounted.
    uuid: as blkid prints it (vfat: XXXX-XXXX).
    """

    kind: str
    uuid: str
    mountpoint: str
    label: str = ""
    options: str = ""


@dataclass(frozen=True)
class Partition:
    """A partition. number from 1; start and size in MiB; type: a GPT type GUID, or an MBR type (hex).

    uuid: as the kernel's PARTUUID. holds: a file system, or the name of the volume group whose physical
    volume this is; physical_uuid is then that volume's UUID, in LVM's form. name and attributes: of GPT, as
    sfdisk(8) writes them.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str
    holds: FileSystem | str
    physical_uuid: str = ""
    name: str = ""
    attributes: str = ""


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume; size in MiB; uuid in LVM's form."""

    group: str
    name: str
    size: int
    uuid: str
    holds: FileSystem

    @property
    def mapper(self) -> str:
        """Its name under /dev/mapper: device-mapper doubles the dashes of both names (lvm(8))."""
        return f"{self.group.replace('-', '--')}-{self.name.replace('-', '--')}"


@dataclass(frozen=True)
class VolumeGroup:
    """A volume group. extent: its extent size in MiB; uuid in LVM's form."""

    name: str
    extent: int
    uuid: str


@dataclass(frozen=True)
class Layout:
    """A whole disk. table: gpt or msdos. firmware: bios or uefi. size in MiB. identifier: the GPT's disk
    GUID, or the MBR's 0x-prefixed disk signature.
    """

    table: str
    firmware: str
    size: int
    identifier: str
    partitions: tuple[Partition, ...]
    groups: tuple[VolumeGroup, ...] = ()
    logical: tuple[LogicalVolume, ...] = ()

    @property
    def volumes(self) -> list[tuple[Partition | LogicalVolume, FileSystem]]:
        """Every file system and swap area with what it lies on: partitions first, then logical volumes."""
        places: list[Partition | LogicalVolume] = [*self.partitions, *self.logical]
        return [
            (place, place.holds)
            for place in places
            if isinstance(place.holds, FileSystem) and place.holds.kind not in _NO_FILE_SYSTEM
        ]

    @property
    def mounts(self) -> list[tuple[Partition | LogicalVolume, FileSystem]]:
        """The file systems with a mount point, each after those it is mounted on: `/` first."""
        mounted = [(place, fs) for place, fs in self.volumes if fs.mountpoint.startswith("/")]
        return sorted(mounted, key=lambda pair: PurePosixPath(pair[1].mountpoint).parts)

    @property
    def root(self) -> FileSystem:
        """The root file system."""
        return self.mounts[0][1]

    @property
    def boot(self) -> FileSystem:
        """The file system that holds /boot."""
        return self.holding("/boot")[1]

    @property
    def esp(self) -> FileSystem | None:
        """The EFI system partition's file system, or None."""
        return next((fs for _, fs in self.mounts if _is_esp(fs.kind, fs.mountpoint)), None)

    @property
    def bios_boot(self) -> Partition | None:
        """The BIOS boot partition, where GRUB's core image lies on a GPT disk, or None."""
        for partition in self.partitions:
            if isinstance(partition.holds, FileSystem) and partition.holds.kind == "biosboot":
                return partition
        return None

    def physical(self, group: VolumeGroup) -> list[Partition]:
        """The partitions that are the group's physical volumes."""
        return [partition for partition in self.partitions if partition.holds == group.name]

    def holding(self, path: str) -> tuple[Partition | LogicalVolume, FileSystem]:
        """The file system that holds this absolute path, and what it lies on."""
        wanted = PurePosixPath(path)
        return next(
            pair for pair in reversed(self.mounts) if wanted.is_relative_to(PurePosixPath(pair[1].mountpoint))
        )


def device(place: Partition | LogicalVolume, fs: FileSystem) -> str:
    """How fstab and the kernel name a file system: by its UUID, or a logical volume's /dev/mapper path."""
    return f"/dev/mapper/{place.mapper}" if isinstance(place, LogicalVolume) else f"UUID={fs.uuid}"


def fstab(layout: Layout) -> str:
    """The text of /etc/fstab for this disk (fstab(5))."""
    rows = [("# <file system>", "<mount point>", "<type>", "<options>", "<dump>", "<pass>")]
    for place, fs in layout.mounts:
        usual = "umask=0077" if fs.kind == "vfat" else "defaults"
        # XFS and btrfs check themselves when they are mounted; their fsck does nothing.
        check = 0 if fs.kind in ("xfs", "btrfs") else 1 if fs.mountpoint == "/" else 2
        rows.append((device(place, fs), fs.mountpoint, fs.kind, fs.options or usual, "0", str(check)))
    for place, fs in layout.volumes:
        if fs.kind == "swap":
            rows.append((device(place, fs), "none", "swap", fs.options or "defaults", "0", "0"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def kernel_root(layout: Layout) -> str:
    """The value of the kernel's `root=`: UUID=… or /dev/mapper/…"""
    return device(*layout.mounts[0])


def lvm_arguments(layout: Layout) -> list[str]:
    """dracut's arguments for the logical volumes that it mounts, those of / and /usr (dracut.cmdline(7))."""
    return [
        f"rd.lvm.lv={place.group}/{place.name}"
        for place, fs in layout.mounts
        if isinstance(place, LogicalVolume) and fs.mountpoint in ("/", "/usr")
    ]


def plan(storage: Storage, firmware: str, size: int, table: str, seed: str, source: Path) -> Layout:
    """Decide everything about a disk.

    firmware: bios or uefi. size: the disk's, in MiB. table: gpt or msdos, where the kickstart does not say.
    seed: what all UUIDs are derived from. source: the kickstart, named in errors.
    Raises InputError naming the kickstart's line when it does not fit, or could not boot.
    """
    planner = _Planner(storage, firmware, size, storage.table or table, seed, source)
    return planner.layout()


@dataclass(frozen=True)
class _Planner:
    storage: Storage
    firmware: str
    size: int
    table: str
    seed: str
    source: Path

    def layout(self) -> Layout:
        self._check()
        identifier = str(self._uuid("disk")) if self.table == "gpt" else f"0x{self._signature():08x}"
        partitions = self._partitions()
        groups = tuple(
            VolumeGroup(group.name, group.extent, self._lvm_uuid(f"group {group.name}"))
            for group in self.storage.groups
        )
        logical = tuple(volume for group in groups for volume in self._logical(group, partitions))
        return Layout(self.table, self.firmware, self.size, identifier, partitions, groups, logical)

    # What must be there, and what must not

    def _check(self) -> None:
        every = (*self.storage.partitions, *self.storage.logical)
        first = every[0].line if every else None
        for volume in every:
            self._check_volume(volume)
        self._check_unique([volume for volume in every if volume.mountpoint.startswith("/")])
        if not any(volume.mountpoint == "/" for volume in every):
            raise self._error(
                first, "no file system for /", "add one, such as: part / --fstype=ext4 --size=1024 --grow"
            )
        for mountpoint in ("/", "/boot"):
            for volume in every:
                if volume.mountpoint == mountpoint and volume.filesystem not in ("ext4", "xfs", "btrfs"):
                    raise self._error(
                        volume.line, f"{mountpoint} cannot be {volume.filesystem}", "use ext4, xfs or btrfs"
                    )
        has_bios_boot = any(volume.filesystem == "biosboot" for volume in self.storage.partitions)
        if self.firmware == "bios" and self.table == "gpt" and not has_bios_boot:
            raise self._error(
                first,
                "a GPT disk that boots from BIOS needs a BIOS boot partition",
                "add: part biosboot --fstype=biosboot --size=1",
            )
        esp = any(_is_esp(volume.filesystem, volume.mountpoint) for volume in self.storage.partitions)
        if self.firmware == "uefi" and not esp:
            raise self._error(
                first,
                "a disk that boots from UEFI needs an EFI system partition",
                "add: part /boot/efi --fstype=efi --size=64",
            )
        if self.table == "msdos":
            self._check_mbr()
        self._check_groups()

    def _check_volume(self, volume: Volume) -> None:
        kind, mountpoint = volume.filesystem, volume.mountpoint
        if volume.size < 1 and not volume.grow:
            raise self._error(volume.line, f"{mountpoint} has no size", "give --size in MiB, or --grow")
        allowed = _LABEL_BYTES.get(kind, 0)
        if len(volume.label.encode()) > allowed:
            raise self._error(volume.line, f"label {volume.label!r} is too long", f"{kind}: {allowed} bytes")
        if volume.maximum is not None and volume.maximum < volume.size:
            raise self._error(volume.line, f"--maxsize={volume.maximum} is less than --size={volume.size}")
        if mountpoint.startswith("/") and str(PurePosixPath(mountpoint)) != mountpoint:
            raise self._error(volume.line, f"{mountpoint} is not a plain absolute path")
        if kind == "vfat" and mountpoint not in _ESP_MOUNTPOINTS:
            places = " or ".join(_ESP_MOUNTPOINTS)
            raise self._error(
                volume.line, "vfat is for the EFI system partition only", f"its mount point is {places}"
            )
        if any(sign.isspace() for sign in mountpoint + volume.options):
            raise self._error(volume.line, f"blanks in {mountpoint!r} or its options")

    def _check_unique(self, mounted: list[Volume]) -> None:
        seen: dict[str, int] = {}
        for volume in mounted:
            if volume.mountpoint in seen:
                raise self._error(
                    volume.line,
                    f"{volume.mountpoint} is there twice, first in line {seen[volume.mountpoint]}",
                )
            seen[volume.mountpoint] = volume.line

    def _check_mbr(self) -> None:
        partitions = self.storage.partitions
        for volume in partitions:
            if volume.filesystem == "biosboot":
                raise self._error(
                    volume.line, "an MBR disk has no BIOS boot partition", "remove it, or use GPT"
                )
        if len(partitions) > _MBR_PRIMARY:
            raise self._error(
                partitions[_MBR_PRIMARY].line, "an MBR disk has at most four partitions", "use GPT, or LVM"
            )

    def _check_groups(self) -> None:
        declared = {
            volume.mountpoint: volume for volume in self.storage.partitions if volume.filesystem == "lvmpv"
        }
        used: set[str] = set()
        names: set[str] = set()
        for group in self.storage.groups:
            self._check_lvm_name(group.name, group.line)
            if group.name in names:
                raise self._error(group.line, f"volume group {group.name} is there twice")
            names.add(group.name)
            for name in group.physical:
                if name not in declared:
                    raise self._error(
                        group.line, f"there is no physical volume {name}", f"add: part {name} --size=…"
                    )
                if name in used:
                    raise self._error(group.line, f"physical volume {name} is in two volume groups")
                used.add(name)
        for name, volume in declared.items():
            if name not in used:
                raise self._error(
                    volume.line, f"physical volume {name} is in no volume group", f"add: volgroup NAME {name}"
                )
        seen: set[tuple[str, str]] = set()
        for volume in self.storage.logical:
            self._check_lvm_name(volume.name, volume.line)
            if volume.group not in names:
                raise self._error(volume.line, f"there is no volume group {volume.group}")
            if volume.filesystem in ("lvmpv", "biosboot") or _is_esp(volume.filesystem, volume.mountpoint):
                raise self._error(
                    volume.line, f"a logical volume cannot be {volume.filesystem}", "make it a partition"
                )
            if (volume.group, volume.name) in seen:
                raise self._error(volume.line, f"logical volume {volume.group}/{volume.name} is there twice")
            seen.add((volume.group, volume.name))

    def _check_lvm_name(self, name: str, line: int) -> None:
        if not re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,62}", name):  # lvm(8), VALID NAMES
            raise self._error(line, f"{name!r} is no name for LVM", "use letters, digits and + _ . -")

    # Where everything goes

    def _partitions(self) -> tuple[Partition, ...]:
        volumes = self.storage.partitions
        # The last MiB of a GPT disk keeps the second copy of the table.
        room = self.size - FIRST - (1 if self.table == "gpt" else 0)
        sizes = self._shares(
            volumes, [volume.size for volume in volumes], room, 1, f"a disk of {self.size} MiB"
        )
        result = []
        start = FIRST
        group_of = {name: group.name for group in self.storage.groups for name in group.physical}
        for number, (volume, size) in enumerate(zip(volumes, sizes, strict=True), start=1):
            if self.table == "gpt":
                identity = str(self._uuid(f"partition {number}"))
            else:
                identity = f"{self._signature():08x}-{number:02x}"
            partition = Partition(number, start, size, self._type(volume), identity, "")
            if volume.filesystem == "lvmpv":
                partition = replace(
                    partition,
                    holds=group_of[volume.mountpoint],
                    physical_uuid=self._lvm_uuid(f"physical {volume.mountpoint}"),
                )
            else:
                partition = replace(partition, holds=self._file_system(volume, f"partition {number}"))
            result.append(partition)
            start += size
        return tuple(result)

    def _logical(self, group: VolumeGroup, partitions: Sequence[Partition]) -> list[LogicalVolume]:
        volumes = [volume for volume in self.storage.logical if volume.group == group.name]
        extents = sum(
            (partition.size - PHYSICAL_VOLUME_HEADER) // group.extent
            for partition in partitions
            if partition.holds == group.name
        )
        least = [-(-volume.size // group.extent) for volume in volumes]
        room = f"volume group {group.name} of {extents * group.extent} MiB"
        sizes = self._shares(volumes, least, extents, group.extent, room)
        return [
            LogicalVolume(
                group.name,
                volume.name,
                size * group.extent,
                self._lvm_uuid(f"logical {group.name}/{volume.name}"),
                self._file_system(volume, f"logical {group.name}/{volume.name}"),
            )
            for volume, size in zip(volumes, sizes, strict=True)
        ]

    def _shares(
        self, volumes: Sequence[Volume], least: Sequence[int], room: int, unit: int, where: str
    ) -> list[int]:
        """Sizes in units of `unit` MiB: at least `least`; what is left goes to those that grow.

        They share it in proportion to their sizes, as Anaconda does (blivet: Chunk.grow_requests).
        """
        sizes = [max(size, 1) for size in least]
        for index, volume in enumerate(volumes):
            missing = (sum(sizes[: index + 1]) - room) * unit
            if missing > 0:
                raise self._error(
                    volume.line,
                    f"{volume.mountpoint} does not fit: {where} is {missing} MiB too small",
                    "make the disk larger, or this or another volume smaller",
                )
        left = room - sum(sizes)
        growing = [index for index, volume in enumerate(volumes) if volume.grow]
        while left > 0 and growing:
            weight = sum(sizes[index] for index in growing)
            gains = {index: left * sizes[index] // weight for index in growing}
            # Whole units only: what rounding leaves goes to the last one.
            gains[growing[-1]] += left - sum(gains.values())
            for index in tuple(growing):
                maximum = volumes[index].maximum
                most = gains[index] if maximum is None else max(0, maximum // unit - sizes[index])
                if gains[index] >= most and maximum is not None:
                    growing.remove(index)
                gain = min(gains[index], most)
                sizes[index] += gain
                left -= gain
        for volume, size in zip(volumes, sizes, strict=True):
            smallest = _SMALLEST[volume.filesystem]
            if size * unit < smallest:
                raise self._error(
                    volume.line,
                    f"{volume.mountpoint} is too small for {volume.filesystem}: {size * unit} MiB",
                    f"give it at least --size={smallest}",
                )
        return sizes

    # What everything is called

    def _file_system(self, volume: Volume, role: str) -> FileSystem:
        identity = self._uuid(f"file system {role}")
        name = str(identity)
        if volume.filesystem == "vfat":
            name = f"{identity.hex[:4]}-{identity.hex[4:8]}".upper()
        if volume.filesystem == "biosboot":
            name = ""
        return FileSystem(volume.filesystem, name, volume.mountpoint, volume.label, volume.options)

    def _type(self, volume: Volume) -> str:
        if self.table == "msdos":
            return _MBR_BY_KIND.get(volume.filesystem, _MBR_LINUX)
        if volume.filesystem in _GPT_BY_KIND:
            return _GPT_BY_KIND[volume.filesystem]
        return _GPT_BY_MOUNTPOINT.get(volume.mountpoint, _GPT_LINUX)

    def _uuid(self, role: str) -> uuid.UUID:
        return uuid.uuid5(_NAMESPACE, f"{self.seed}\n{role}")

    def _signature(self) -> int:
        return self._uuid("disk").int & 0xFFFFFFFF or 1  # 0 is an unset signature

    def _lvm_uuid(self, role: str) -> str:
        digits = self._uuid(role).hex
        cuts = (0, 6, 10, 14, 18, 22, 26, 32)  # LVM groups the 32 signs of its UUIDs so
        return "-".join(digits[start:end] for start, end in itertools.pairwise(cuts))

    def _error(self, line: int | None, message: str, hint: str = "") -> InputError:
        return InputError(self.source, line, message, hint)


def _is_esp(kind: str, mountpoint: str) -> bool:
    return kind == "vfat" and mountpoint in _ESP_MOUNTPOINTS
