"""LVM's description of a volume group, as a text with every UUID fixed: vgcfgrestore makes the group from it.

vgcreate and lvcreate would draw UUIDs by lot. The format is that of LVM's backup files (vgcfgbackup(8);
lib/format_text/export.c in lvm2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vdibuild.disk.layout import PHYSICAL_VOLUME_HEADER, Layout, LogicalVolume, VolumeGroup

_SECTORS_PER_MIB = 2048


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
