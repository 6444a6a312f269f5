"""Partitions, volume groups and file systems of a disk, by what is written on it, before any file is read."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vdibuild import process
from vdibuild.disk import lvm
from vdibuild.disk.image import Image, confined
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition, VolumeGroup
from vdibuild.errors import CommandError, InputError

_MIB = 1 << 20
_SECTOR = 512
_EDGE = _MIB
"""How much of the beginning and of the end of a disk or a partition is looked at to recognise it."""

_GPT_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
_MBR_EXTENDED = ("5", "f", "85")
_MBR_PARTITIONS = 446  # offset of the four entries of 16 bytes; type at 4, first sector at 8
_MOST_LOGICAL = 60  # sfdisk's own limit

_KINDS = {name: name for name in ("ext4", "xfs", "btrfs", "vfat", "swap")} | {"ext2": "ext4", "ext3": "ext4"}
# In blkid's words; what is not here is named as blkid names it.
_REFUSED = {
    "crypto_LUKS": ("encrypted (LUKS)", "decrypt it first: cryptsetup-reencrypt(8)"),
    "BitLocker": ("encrypted (BitLocker)", ""),
    "linux_raid_member": ("a member of a RAID", "copy the system onto a disk without one"),
    "zfs_member": ("ZFS", "ext4, XFS and btrfs are understood"),
    "bcache": ("a bcache device", "detach the cache first"),
    "swsuspend": ("the memory of a hibernated machine", "start it, and shut it down"),
    "swsusp": ("the memory of a hibernated machine", "start it, and shut it down"),
    "ntfs": ("NTFS", "only Linux systems are understood"),
    "hfsplus": ("HFS+", "only Linux systems are understood"),
}


def name_of(place: Partition | LogicalVolume) -> str:
    """A name for a partition (`partition 2`) or a logical volume (`group/name`)."""
    if isinstance(place, LogicalVolume):
        return f"{place.group}/{place.name}"
    return f"partition {place.number}"


@dataclass
class Structure:
    """A disk's structure. layout: without mount points and firmware. size: of the disk, in bytes.

    pieces: where each place lies, as offset and size in bytes, and types: its file system's own name, both
    by `name_of`. Raises InputError for what is not understood.
    """

    image: Image
    layout: Layout = field(init=False)
    size: int = field(init=False)
    pieces: dict[str, tuple[tuple[int, int], ...]] = field(init=False, default_factory=dict)
    types: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.size = self.image.size
        table = self._table()
        kind = {"gpt": "gpt", "dos": "msdos"}.get(table["label"])
        if kind is None:
            raise self._refused(f"its partition table is of the kind {table['label']}", "use GPT or MBR")
        partitions, found = [], {}
        for entry in sorted(table["partitions"], key=lambda entry: int(entry["start"])):
            partition = self._partition(entry, kind)
            if kind == "msdos":  # as the kernel makes one up (block/partitions/msdos.c)
                identity = f"{int(table['id'], 16):08x}-{partition.number:02x}"
                partition = replace(partition, uuid=identity)
            partitions.append(partition)
            if isinstance(partition.holds, str):
                found[partition.number] = self._physical(partition, entry["start"] * _SECTOR)
        groups, logical = self._groups(partitions, found)
        partitions = [
            replace(part, holds=found[part.number].group_name, physical_uuid=found[part.number].uuid)
            if part.number in found
            else part
            for part in partitions
        ]
        self.layout = Layout(
            kind, "", self.size // _MIB, table["id"].lower(), tuple(partitions), groups, logical
        )

    def kind(self, place: Partition | LogicalVolume) -> str:
        """The kind of its file system; empty for a physical volume."""
        return place.holds.kind if isinstance(place.holds, FileSystem) else ""

    def named(self, source: str) -> str | None:
        """Which place an fstab means; None when it is not of this disk."""
        source = source.replace('"', "")
        tag, _, value = source.partition("=")
        link = re.fullmatch(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", source)
        if link:
            tag, value = link[1].upper(), link[2]
        for place, fs in self.layout.volumes:
            names = {("UUID", fs.uuid.lower()), ("LABEL", fs.label.lower())}
            if isinstance(place, Partition):
                names |= {("PARTUUID", place.uuid.lower()), ("PARTLABEL", place.name.lower())}
                devices = [rf"/dev/(?:[sv]d|xvd|hd)a{place.number}", rf"/dev/nvme0n1p{place.number}"]
            else:
                devices = [re.escape(f"/dev/{name}") for name in (name_of(place), f"mapper/{place.mapper}")]
            tagged = bool(value) and (tag, value.lower()) in names
            if tagged or any(re.fullmatch(name, source) for name in devices):
                return name_of(place)
        return None

    def _table(self) -> dict[str, Any]:
        """The partition table as sfdisk reads it from a copy of the sectors that hold it."""
        with self._edges(0, self.size) as copy:
            first = self.image.read(0, _SECTOR)
            for number in range(4):
                entry = first[_MBR_PARTITIONS + 16 * number :][:16]
                if len(entry) == 16 and f"{entry[4]:x}" in _MBR_EXTENDED:
                    self._copy_logical(int.from_bytes(entry[8:12], "little"), copy)
            argv = ["sfdisk", "--json", str(copy)]
            try:
                done = process.run(confined(argv, self.image.scratch), capture=True)
            except CommandError as error:
                raise self._refused(
                    "there is no partition table on it", "whole disks are understood"
                ) from error
        table: dict[str, Any] = json.loads(done.stdout)["partitiontable"]
        for entry in table.get("partitions", []):
            entry["number"] = int(entry["node"].removeprefix(str(copy)).removeprefix("p"))
            if (entry["start"] + entry["size"]) * _SECTOR > self.size:
                raise self._refused(
                    f"partition {entry['number']} ends behind the disk's end", "is it cut off?"
                )
        if not table.get("partitions"):
            raise self._refused("there is no partition on it")
        return table

    def _copy_logical(self, extended: int, copy: Path) -> None:
        """Copy the chain of tables in an extended partition: each names the next, relative to the first."""
        sector = extended
        with copy.open("r+b") as file:
            for _ in range(_MOST_LOGICAL):
                table = self.image.read(sector * _SECTOR, _SECTOR)
                file.seek(sector * _SECTOR)
                file.write(table)
                following = table[_MBR_PARTITIONS + 16 :][:16]
                if len(following) < 16 or not any(following[4:]):
                    return
                sector = extended + int.from_bytes(following[8:12], "little")

    @contextlib.contextmanager
    def _edges(self, offset: int, size: int) -> Iterator[Path]:
        """A sparse file of that size that has the first and the last MiB of a part of the disk."""
        copy = self.image.scratch / "edges"
        with copy.open("wb") as file:
            file.truncate(size)
            file.write(self.image.read(offset, min(_EDGE, size)))
            if size > _EDGE:
                start = max(_EDGE, size - _EDGE)
                file.seek(start)
                file.write(self.image.read(offset + start, size - start))
        yield copy
        copy.unlink()

    def _partition(self, entry: Mapping[str, Any], table: str) -> Partition:
        number, kind = entry["number"], entry["type"].lower()
        start, size = entry["start"] * _SECTOR, entry["size"] * _SECTOR
        partition = Partition(
            number=number,
            start=start // _MIB,
            size=size // _MIB,
            type=kind,
            uuid=entry.get("uuid", "").lower(),
            holds="",
            name=entry.get("name", ""),
            attributes=entry.get("attrs", ""),
        )
        self.pieces[name_of(partition)] = ((start, size),)
        if kind == _GPT_BIOS_BOOT:
            return replace(partition, holds=FileSystem("biosboot", "", "biosboot"))
        if table == "msdos" and kind in _MBR_EXTENDED:
            return replace(partition, holds=FileSystem("extended", "", "extended"))
        with self._edges(start, size) as copy:
            holds = self._recognised(copy, name_of(partition))
        return replace(partition, holds=holds)

    def _recognised(self, copy: Path, name: str) -> FileSystem | str:
        """What a volume holds, by its first and last MiB; an empty string for a physical volume."""
        argv = ["blkid", "--probe", "--output", "export", str(copy)]
        done = process.run(confined(argv, self.image.scratch), capture=True, check=False)
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        kind = found.get("TYPE", "")
        if kind == "LVM2_member":
            return ""
        if kind in _KINDS:
            self.types[name] = kind
            mountpoint = "swap" if kind == "swap" else ""
            label = _unescaped(found.get("LABEL", ""))
            return FileSystem(_KINDS[kind], found.get("UUID", ""), mountpoint, label)
        what, hint = _REFUSED.get(kind, (kind or "nothing that is known", ""))
        raise self._refused(f"{name} holds {what}", hint)

    def _physical(self, partition: Partition, offset: int) -> lvm.PhysicalVolume:
        name = name_of(partition)
        try:
            found = lvm.read(self.image.read(offset, 4 * _MIB))
        except (struct.error, ValueError, IndexError) as error:
            raise self._refused(f"{name}: LVM's metadata are damaged: {error}") from error
        if found is None:
            raise self._refused(f"{name} is a physical volume of no volume group", "remove it, or use it")
        return found

    def _groups(
        self, partitions: Sequence[Partition], found: Mapping[int, lvm.PhysicalVolume]
    ) -> tuple[tuple[VolumeGroup, ...], tuple[LogicalVolume, ...]]:
        groups: dict[str, VolumeGroup] = {}
        logical: list[LogicalVolume] = []
        offsets = {
            found[part.number].uuid: self.pieces[name_of(part)][0][0]
            for part in partitions
            if part.number in found
        }
        for physical in found.values():
            name = physical.group_name
            if name in groups:
                continue
            try:
                volumes = self._logical(name, physical.group, offsets)
                sectors = int(physical.group["extent_size"])
                groups[name] = VolumeGroup(name, sectors * _SECTOR // _MIB, str(physical.group["id"]))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise self._refused(f"the description of volume group {name} is not understood") from error
            if sectors * _SECTOR % _MIB:
                raise self._refused(f"the extents of volume group {name} are no whole MiB")
            logical += volumes
        return tuple(groups.values()), tuple(logical)

    def _logical(
        self, group: str, description: Mapping[str, Any], offsets: Mapping[str, int]
    ) -> list[LogicalVolume]:
        extent = int(description["extent_size"]) * _SECTOR
        places: dict[str, int] = {}
        for key, physical in description["physical_volumes"].items():
            if physical["id"] not in offsets:
                raise self._refused(
                    f"volume group {group} has a physical volume that is not on this disk",
                    "systems on several disks are not understood",
                )
            places[key] = offsets[physical["id"]] + int(physical["pe_start"]) * _SECTOR
        result = []
        for name, volume in description.get("logical_volumes", {}).items():
            pieces = []
            segments = [value for key, value in volume.items() if re.fullmatch(r"segment\d+", key)]
            for segment in sorted(segments, key=lambda segment: int(segment["start_extent"])):
                if segment["type"] != "striped" or segment["stripe_count"] != 1:
                    what = "striped" if segment["type"] == "striped" else segment["type"]
                    raise self._refused(
                        f"logical volume {group}/{name} is of the kind {what}",
                        "plain (linear) ones are understood",
                    )
                key, first = segment["stripes"]
                pieces.append((places[key] + first * extent, segment["extent_count"] * extent))
            for offset, size in pieces:
                if offset < 0 or size <= 0 or offset + size > self.size:
                    raise self._refused(f"logical volume {group}/{name} ends behind the disk's end")
            found = LogicalVolume(
                group,
                name,
                sum(size for _, size in pieces) // _MIB,
                str(volume["id"]),
                FileSystem("", "", ""),
            )
            self.pieces[name_of(found)] = tuple(pieces)
            result.append(replace(found, holds=self._held(found)))
        return result

    def _held(self, volume: LogicalVolume) -> FileSystem:
        name = name_of(volume)
        pieces = self.pieces[name]
        copy = self.image.scratch / "edges"
        size = sum(length for _, length in pieces)
        with copy.open("wb") as file:
            file.truncate(size)
            file.write(self.image.read(pieces[0][0], min(_EDGE, pieces[0][1])))
            offset, length = pieces[-1]
            if size > _EDGE:
                tail = min(_EDGE, length, size - _EDGE)
                file.seek(size - tail)
                file.write(self.image.read(offset + length - tail, tail))
        holds = self._recognised(copy, name)
        copy.unlink()
        if isinstance(holds, str):
            raise self._refused(f"{name} is itself a physical volume")
        return holds

    def _refused(self, message: str, hint: str = "") -> InputError:
        return InputError(self.image.path, None, message, hint)


def _unescaped(text: str) -> str:
    """A value as blkid prints it: with \\xNN for what is not printable, and \\ before other signs."""
    return re.sub(
        r"\\(?:x([0-9a-f]{2})|(.))", lambda sign: chr(int(sign[1], 16)) if sign[1] else sign[2], text
    )
