"""LVM's description of a volume group: written with every UUID fixed, and read back from a disk.

vgcreate and lvcreate would draw UUIDs by lot, and need a device. The text is that of LVM's backup files
(vgcfgbackup(8); lib/format_text/export.c in lvm2).
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdibuild.disk.layout import PHYSICAL_VOLUME_HEADER, Layout, LogicalVolume, Partition, VolumeGroup

_SECTORS_PER_MIB = 2048
_SECTOR = 512


@dataclass(frozen=True)
class Segment:
    """A piece of a logical volume on one physical volume; positions and count in extents."""

    physical: int
    """Which of the group's physical volumes, from 0."""
    physical_start: int
    start: int
    count: int


def segments(layout: Layout, group: VolumeGroup) -> dict[LogicalVolume, list[Segment]]:
    """Where the group's logical volumes lie: one after the other, from one physical volume to the next."""
    room = [_extents(layout, group, index) for index in range(len(layout.physical(group)))]
    result: dict[LogicalVolume, list[Segment]] = {}
    physical = used = 0
    for volume in layout.logical:
        if volume.group != group.name:
            continue
        pieces, start, wanted = [], 0, volume.size // group.extent
        while start < wanted:
            if used == room[physical]:
                physical, used = physical + 1, 0
                continue
            count = min(wanted - start, room[physical] - used)
            pieces.append(Segment(physical, used, start, count))
            start, used = start + count, used + count
        result[volume] = pieces
    return result


def description(layout: Layout, group: VolumeGroup, devices: list[str], created: int) -> str:
    """The group's description.

    devices: its physical volumes as the system that restores it names them, in the layout's order.
    created: seconds since 1970.
    """
    return "".join(f"{line}\n" for line in _lines(layout, group, devices, created))


def _lines(layout: Layout, group: VolumeGroup, devices: list[str], created: int) -> Iterator[str]:
    yield 'contents = "Text Format Volume Group"'
    yield "version = 1"
    yield f"{group.name} {{"
    yield f'  id = "{group.uuid}"'
    yield "  seqno = 1"
    yield '  format = "lvm2"'
    yield '  status = ["RESIZEABLE", "READ", "WRITE"]'
    yield "  flags = []"
    yield f"  extent_size = {group.extent * _SECTORS_PER_MIB}"
    yield "  max_lv = 0"
    yield "  max_pv = 0"
    yield "  metadata_copies = 0"
    yield "  physical_volumes {"
    for index, (partition, device) in enumerate(zip(layout.physical(group), devices, strict=True)):
        yield f"    pv{index} {{"
        yield f'      id = "{partition.physical_uuid}"'
        yield f'      device = "{device}"'
        yield '      status = ["ALLOCATABLE"]'
        yield "      flags = []"
        yield f"      dev_size = {partition.size * _SECTORS_PER_MIB}"
        yield f"      pe_start = {PHYSICAL_VOLUME_HEADER * _SECTORS_PER_MIB}"
        yield f"      pe_count = {_extents(layout, group, index)}"
        yield "    }"
    yield "  }"
    yield "  logical_volumes {"
    for volume, pieces in segments(layout, group).items():
        yield f"    {volume.name} {{"
        yield f'      id = "{volume.uuid}"'
        yield '      status = ["READ", "WRITE", "VISIBLE"]'
        yield "      flags = []"
        yield f"      creation_time = {created}"
        yield '      creation_host = "vdibuild"'
        yield f"      segment_count = {len(pieces)}"
        for number, piece in enumerate(pieces, start=1):
            yield f"      segment{number} {{"
            yield f"        start_extent = {piece.start}"
            yield f"        extent_count = {piece.count}"
            yield '        type = "striped"'
            yield "        stripe_count = 1"
            yield f'        stripes = ["pv{piece.physical}", {piece.physical_start}]'
            yield "      }"
        yield "    }"
    yield "  }"
    yield "}"


def _extents(layout: Layout, group: VolumeGroup, index: int) -> int:
    return (layout.physical(group)[index].size - PHYSICAL_VOLUME_HEADER) // group.extent


@dataclass(frozen=True)
class PhysicalVolume:
    """A physical volume as it is on a disk. uuid: in LVM's form. group: its group's description, parsed."""

    uuid: str
    group_name: str
    group: dict[str, Any]


_LABEL_SECTORS = 4
_LABEL, _LABEL_TYPE = b"LABELONE", b"LVM2 001"
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_HEADER = 512


def read(data: bytes) -> PhysicalVolume | None:
    """The physical volume that begins with these bytes, or None where its metadata cannot be found.

    data: the volume's first bytes, its metadata area included (1 MiB by default). The formats are those of
    lvm2's lib/label/label.h (label_header), lib/format_text/layout.h (pv_header, mda_header, raw_locn).
    """
    for sector in range(_LABEL_SECTORS):
        start = sector * _SECTOR
        if data[start : start + 8] != _LABEL or data[start + 24 : start + 32] != _LABEL_TYPE:
            continue
        (offset,) = struct.unpack_from("<I", data, start + 20)
        header = start + offset
        digits = data[header : header + 32].decode("ascii", errors="replace")
        position = header + 40  # behind the UUID and the device's size
        areas: list[list[int]] = []
        while len(areas) < 2:  # data areas, then metadata areas, each list ended by zeros
            starts = []
            while (place := struct.unpack_from("<QQ", data, position))[0]:
                starts.append(place[0])
                position += 16
            position += 16
            areas.append(starts)
        for area in areas[1]:
            if (text := _area_text(data, area)) is not None:
                parsed = parse(text)
                for name, group in parsed.items():
                    if isinstance(group, dict):
                        return PhysicalVolume(_dashed(digits), name, group)
    return None


def _area_text(data: bytes, area: int) -> str | None:
    """The newest description in a metadata area, which is written round and round."""
    if data[area + 4 : area + 20] != _AREA_MAGIC:
        return None
    _, size, offset, length = struct.unpack_from("<QQQQ", data, area + 24)
    if not length or length > size or area + size > len(data):
        return None
    ring = data[area : area + size]
    text = ring[offset : offset + length]
    text += ring[_AREA_HEADER : _AREA_HEADER + length - len(text)]
    return text.decode("utf-8", errors="replace").rstrip("\0")


_TOKEN = re.compile(r'\s+|#[^\n]*|("(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]=,])')


def parse(text: str) -> dict[str, Any]:
    """A description's sections as dictionaries, its lists as lists, its values as int or str.

    Raises ValueError when it is not well-formed.
    """
    tokens = iter([token for token in _TOKEN.findall(text) if token])
    section: dict[str, Any] = {}
    stack = [section]
    for token in tokens:
        if token == "}":  # noqa: S105
            stack.pop()
            if not stack:
                raise ValueError("a } too many")
            continue
        sign = next(tokens, "")
        if sign == "{":
            stack.append(stack[-1].setdefault(token, {}))
        elif sign == "=":
            value = next(tokens, "")
            stack[-1][token] = _list(tokens) if value == "[" else _value(value)
        else:
            raise ValueError(f"{sign!r} after {token!r}")
    if len(stack) != 1:
        raise ValueError("a } is missing")
    return section


def _list(tokens: Iterator[str]) -> list[int | str]:
    return [_value(word) for word in itertools.takewhile(lambda word: word != "]", tokens) if word != ","]


def _value(token: str) -> int | str:
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return int(token) if re.fullmatch(r"-?\d+", token) else token


def _dashed(digits: str) -> str:
    return "-".join(digits[start:end] for start, end in itertools.pairwise((0, 6, 10, 14, 18, 22, 26, 32)))


_METADATA_START = 4096
_CHECKSUM_START = 0xF597A6CF  # INITIAL_CRC in lvm2's lib/misc/crc.h
_USED = 1  # PV_EXT_USED


def write(layout: Layout, group: VolumeGroup, disk: Path, created: int) -> None:
    """Write a group's physical volumes onto a raw disk that is zeros there: no device-mapper is needed.

    disk: has its partition table. created: seconds since 1970.
    """
    devices = [f"/dev/vda{partition.number}" for partition in layout.physical(group)]
    lines = list(_lines(layout, group, devices, created))
    # LVM takes a group's name from the first bytes of its description on a disk.
    text = "".join(f"{line}\n" for line in [*lines[2:], *lines[:2], 'description = ""']).encode() + b"\0"
    area = (PHYSICAL_VOLUME_HEADER << 20) - _METADATA_START
    if _AREA_HEADER + len(text) > area // 2:  # LVM keeps two descriptions when it changes them
        raise ValueError(f"the description of volume group {group.name} is too long")
    with disk.open("r+b") as file:
        for partition in layout.physical(group):
            file.seek((partition.start << 20) + _SECTOR)
            file.write(_label(partition))
            file.seek((partition.start << 20) + _METADATA_START)
            file.write(_area_header(area, text) + text)


def pieces(layout: Layout, volume: LogicalVolume) -> list[tuple[int, int]]:
    """Where a logical volume lies on a disk that `write` has written: offset and size in bytes."""
    group = next(group for group in layout.groups if group.name == volume.group)
    starts = [partition.start + PHYSICAL_VOLUME_HEADER for partition in layout.physical(group)]
    return [
        (
            (starts[piece.physical] + piece.physical_start * group.extent) << 20,
            (piece.count * group.extent) << 20,
        )
        for piece in segments(layout, group)[volume]
    ]


def _label(partition: Partition) -> bytes:
    """A physical volume's label and header, in one sector."""
    header = partition.physical_uuid.replace("-", "").encode()
    header += struct.pack("<Q", partition.size << 20)
    header += struct.pack("<QQQQ", PHYSICAL_VOLUME_HEADER << 20, 0, 0, 0)
    area = (PHYSICAL_VOLUME_HEADER << 20) - _METADATA_START
    header += struct.pack("<QQQQ", _METADATA_START, area, 0, 0)
    header += struct.pack("<IIQQ", 2, _USED, 0, 0)  # the extension: version, flags, no boot loader areas
    checked = (struct.pack("<I", 32) + _LABEL_TYPE + header).ljust(_SECTOR - 20, b"\0")
    return _LABEL + struct.pack("<QI", 1, _checksum(checked)) + checked


def _area_header(area: int, text: bytes) -> bytes:
    place = struct.pack("<QQII", _AREA_HEADER, len(text), _checksum(text), 0)
    checked = (_AREA_MAGIC + struct.pack("<IQQ", 1, _METADATA_START, area) + place).ljust(
        _AREA_HEADER - 4, b"\0"
    )
    return struct.pack("<I", _checksum(checked)) + checked


def _checksum(data: bytes) -> int:
    """LVM's CRC-32: zlib's, but for where it starts and its complement."""
    return zlib.crc32(data, _CHECKSUM_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
