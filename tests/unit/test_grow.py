"""Layouts on other disks, and ext4 file systems that grow within an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vdibuild.disk import ext4, grow, native
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition, VolumeGroup
from vdibuild.errors import VdibuildError

UUID = "5e9f4c6e-0f5c-4b8e-9a3c-1d2e3f405162"
BOOT = Partition(1, 1, 4, "83", "", FileSystem("ext4", UUID, "/boot"))
MIB = 1 << 20


def plain(size: int) -> Layout:
    root = Partition(2, 5, size - 6, "83", "", FileSystem("ext4", UUID.replace("5", "6"), "/"))
    table = "gpt"
    identifier = "8d3c1f0e-52c4-4d0b-9d6a-1f4f3f0c7a11"
    kind = "0fc63daf-8483-4772-8e79-3d69d8477de4"
    parts = (BOOT, root)
    numbered = tuple(
        Partition(one.number, one.start, one.size, kind, f"{identifier[:-1]}{one.number}", one.holds)
        for one in parts
    )
    return Layout(table, "bios", size, identifier, numbered)


def lvm() -> Layout:
    volumes = (
        LogicalVolume("system", "swap", 100, "", FileSystem("swap", UUID, "swap")),
        LogicalVolume("system", "root", 396, "", FileSystem("xfs", UUID, "/")),
    )
    parts = (BOOT, Partition(2, 5, 507, "8e", "", "system"))
    return Layout("msdos", "bios", 512, "0x1", parts, (VolumeGroup("system", 4, ""),), volumes)


def test_the_last_partition_gets_the_room() -> None:
    larger = grow.resized(plain(64), 100)
    assert [(one.start, one.size) for one in larger.partitions] == [(1, 4), (5, 94)]
    assert larger.size == 100
    assert grow.resized(larger, 64) == plain(64)


def test_the_volume_of_the_root_gets_the_room() -> None:
    larger = grow.resized(lvm(), 1024)
    assert {one.name: one.size for one in larger.logical} == {"swap": 100, "root": 1016 - 100}
    assert grow.growing(larger).size == 916


def test_nothing_would_be_left() -> None:
    with pytest.raises(VdibuildError, match="a disk of 6 MiB is too small"):
        grow.resized(plain(64), 6)
    with pytest.raises(VdibuildError, match="too small"):
        grow.resized(lvm(), 64)


def test_an_ext4_grows_where_it_lies(tmp_path: Path) -> None:
    """The image keeps its size, and what is behind the file system: resize2fs would cut it off."""
    disk = tmp_path / "disk"
    before, after = plain(64), plain(300)
    with disk.open("wb") as file:
        file.truncate(300 * MIB)
    content = tmp_path / "content"
    content.mkdir()
    (content / "file").write_text("kept")
    place = grow.last_partition(before)
    volume = f"{disk}?offset={place.start * MIB}"
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(content), "-E", f"offset={place.start * MIB}"]
    subprocess.run([*make, str(disk), f"{place.size}M"], check=True)
    native.write_table(after, disk)
    end = disk.read_bytes()[-MIB:]
    assert end.strip(b"\0")
    grow.grow_ext4(disk, grow.last_partition(after))
    assert disk.stat().st_size == 300 * MIB
    assert disk.read_bytes()[-MIB:] == end
    assert subprocess.run(["e2fsck", "-f", "-n", volume], capture_output=True).returncode == 0
    header = subprocess.run(["dumpe2fs", "-h", volume], check=True, capture_output=True, text=True).stdout
    sizes = {
        key: int(value)
        for key, _, value in (line.partition(":") for line in header.splitlines())
        if key in ("Block count", "Block size")
    }
    assert sizes["Block count"] * sizes["Block size"] == 294 * MIB
    read = subprocess.run(["debugfs", "-R", "cat /file", volume], check=True, capture_output=True)
    assert read.stdout == b"kept"


def test_what_needs_no_check(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={MIB}", str(disk), "16M"]
    with disk.open("wb") as file:
        file.truncate(17 * MIB)
    assert not ext4.is_clean(disk, MIB)
    subprocess.run(make, check=True, capture_output=True)
    assert ext4.is_clean(disk, MIB, checked=True)
    # Mounted, with errors, with files to delete, mounted since the last check, with a journal to replay.
    for change in ("state 0", "state 3", "last_orphan 12", "mtime 20380101", "feature_incompat 0x2c6"):
        subprocess.run(make, check=True, capture_output=True)
        argv = ["debugfs", "-w", "-R", f"set_super_value {change}", f"{disk}?offset={MIB}"]
        subprocess.run(argv, check=True, capture_output=True)
        assert ext4.is_clean(disk, MIB) == ("mtime" in change), change
        assert not ext4.is_clean(disk, MIB, checked=True), change


def test_a_damaged_file_system_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xff" * (64 * MIB))
    with pytest.raises(VdibuildError, match="partition 2 is damaged"):
        grow.check_ext4(disk, grow.last_partition(plain(64)))
