"""Where a smaller disk's parts lie, and what says so on the disk: arithmetic and formats, without a disk."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from vdibuild.disk import bootloader, inspection, layout, lvm, shrink
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.disk.structure import name_of
from vdibuild.recipe import Storage, Volume, VolumeGroup

EXTENDED = FileSystem("extended", "", "extended")


def part(number: int, start: int, size: int, holds: FileSystem | str | None = None) -> Partition:
    return Partition(number, start, size, "83", "", holds or FileSystem("ext4", "", f"/{number}"))


def places(found: Layout) -> list[tuple[int, int, int]]:
    return [(partition.number, partition.start, partition.size) for partition in found.partitions]


def test_logical_partitions_keep_room_for_their_tables() -> None:
    source = Layout(
        "msdos",
        "bios",
        5000,
        "0x1",
        (
            part(1, 1, 500),
            part(2, 502, 4000, EXTENDED),
            part(5, 503, 2000),
            part(6, 2504, 1000),
            part(3, 4600, 9),
        ),
    )
    sizes = {"partition 1": 50, "partition 5": 200, "partition 6": 8, "partition 3": 9}
    found = shrink.plan(source, sizes)
    assert places(found) == [(1, 1, 50), (2, 51, 210), (5, 52, 200), (6, 253, 8), (3, 261, 9)]
    assert found.size == 270


def test_numbers_need_not_be_in_the_disks_order_and_gpt_needs_its_end() -> None:
    source = Layout("gpt", "uefi", 5000, "x", (part(14, 0, 2), part(15, 4, 124), part(1, 200, 4000)))
    found = shrink.plan(source, {"partition 14": 3, "partition 15": 40, "partition 1": 300})
    assert places(found) == [(14, 1, 3), (15, 4, 40), (1, 44, 300)]
    assert found.size == 345


def grouped() -> Layout:
    storage = Storage(
        (Volume("pv.1", "lvmpv", 1000, 1), Volume("pv.2", "lvmpv", 500, 2, grow=True)),
        (VolumeGroup("vg", ("pv.1", "pv.2"), 3, extent=8),),
        (
            Volume("/", "ext4", 1200, 4, name="root", group="vg"),
            Volume("swap", "swap", 16, 5, name="swap", group="vg"),
        ),
    )
    return layout.plan(storage, "bios", 3000, "msdos", "seed", Path("x.ks"))


def test_a_groups_volumes_move_to_its_first_disk_and_its_others_stay() -> None:
    source = grouped()
    found = shrink.plan(source, {"vg/root": 301, "vg/swap": 8})
    assert [volume.size for volume in found.logical] == [304, 8]
    assert places(found) == [(1, 1, 313), (2, 314, 9)]
    assert found.size == 323
    assert [replace(volume, size=0) for volume in found.logical] == [
        replace(volume, size=0) for volume in source.logical
    ]
    assert lvm.pieces(found, found.logical[0]) == [(2 << 20, 304 << 20)]


def test_a_group_that_is_written_is_read_back(tmp_path: Path) -> None:
    found, raw = grouped(), tmp_path / "disk"
    with raw.open("wb") as file:
        file.truncate(found.size << 20)
    lvm.write(found, found.groups[0], raw, 1_700_000_000)
    with raw.open("rb") as file:
        for partition in found.partitions:
            file.seek(partition.start << 20)
            read = lvm.read(file.read(2 << 20))
            assert read and (read.uuid, read.group_name) == (partition.physical_uuid, "vg")
            assert read.group["id"] == found.groups[0].uuid
            assert list(read.group["logical_volumes"]) == ["root", "swap"]
            assert read.group["logical_volumes"]["root"]["segment2"]["stripes"] == ["pv1", 0]


@pytest.mark.parametrize("damage", [b"", b"LABELONE" * 300, bytes(4096)])
def test_what_is_no_physical_volume(damage: bytes) -> None:
    assert lvm.read(damage) is None


def test_a_description_goes_round_and_round_in_its_area(tmp_path: Path) -> None:
    found, raw = grouped(), tmp_path / "disk"
    with raw.open("wb") as file:
        file.truncate(found.size << 20)
    lvm.write(found, found.groups[0], raw, 0)
    start, area = (found.partitions[0].start << 20) + 4096, (1 << 20) - 4096
    with raw.open("r+b") as file:
        file.seek(start)
        header = file.read(512)
        length = struct.unpack_from("<Q", header, 48)[0]
        text = file.read(length)
        # As LVM leaves it after many changes: the description begins 100 bytes before the area's end.
        file.seek(start + 40)
        file.write(struct.pack("<Q", area - 100))
        file.seek(start + area - 100)
        file.write(text[:100])
        file.seek(start + 512)
        file.write(text[100:])
        file.seek(found.partitions[0].start << 20)
        read = lvm.read(file.read(2 << 20))
    assert read and read.group["id"] == found.groups[0].uuid


@pytest.mark.parametrize("text", ["a {", "a { b = 1 } }", "a b"])
def test_a_description_that_is_not_well_formed(text: str) -> None:
    with pytest.raises(ValueError, match=r"\}|after"):
        lvm.parse(text)


def test_a_description_with_comments_lists_and_quotes() -> None:
    lines = ["# made", 'vg { id = "a-b" # x', " flags = []", ' tags = ["one", "t\\"wo"]', " n = -3"]
    text = "\n".join([*lines, " pv0 { x = 1 } }", "version = 1"])
    assert lvm.parse(text) == {
        "vg": {"id": "a-b", "flags": [], "tags": ["one", 't"wo'], "n": -3, "pv0": {"x": 1}},
        "version": 1,
    }


def test_grubs_core_image_moves_with_its_partition() -> None:
    boot = bytes(0x180) + b"GRUB \0Geom\0Hard Disk\0Read\0 Error\0"
    first, core = bootloader.embed(boot.ljust(512, b"\0"), bytes(40_000), 8192)
    moved, image = bootloader.move(first, core[:512], -6144)
    assert bootloader.core_of(moved) == 2048
    again, expected = bootloader.embed(boot.ljust(512, b"\0"), bytes(40_000), 2048)
    assert (moved, image) == (again, expected[:512])
    assert bootloader.core_of(bytes(512)) is None


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("UUID=1 / ext4 defaults 0 1", ("UUID=1", "/", "ext4", "defaults")),
        ("LABEL=a\\040b /mnt/a\\040b xfs", ("LABEL=a b", "/mnt/a b", "xfs", "defaults")),
        ("/dev/sda1 / ext4 ro # 0 0", ("/dev/sda1", "/", "ext4", "ro")),
    ],
)
def test_lines_of_fstab(line: str, read: tuple[str, ...]) -> None:
    assert list(inspection._fstab(f"# fstab\n\n{line}\nnonsense\n")) == [read]


def test_names_of_places() -> None:
    found = grouped()
    assert [name_of(place) for place in found.partitions] == ["partition 1", "partition 2"]
    assert [name_of(place) for place in found.logical] == ["vg/root", "vg/swap"]
