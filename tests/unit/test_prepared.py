"""Disks without their compression: what is checked before a byte of them gets to a volume."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdibuild import hashing
from vdibuild.errors import StoreError
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.settings.keys import Keys
from vdibuild.store import Store

SIZE = 16 << 20
DATA = {0: 4096, 1 << 20: (3 << 20) + 4096, SIZE - 8192: 4096}
"""Where the disk holds something, and how much."""


@dataclass
class Stored:
    """A disk in a store, and the place for it without its compression."""

    directory: Path
    content: bytes
    disks: PreparedDisks

    @property
    def qcow2(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def volume(self) -> Path:
        return self.directory / "volume"

    @property
    def place(self) -> Path:
        return self.disks.directory / self.digest

    def copy(self) -> bytes:
        """Copy it to a new volume; returns what that holds then."""
        with self.volume.open("wb") as file:
            file.truncate(SIZE * 2)
        self.disks.copy(self.qcow2, self.digest, self.volume)
        return self.volume.read_bytes()[:SIZE]

    def __post_init__(self) -> None:
        raw = self.directory / "raw"
        raw.write_bytes(self.content)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-c", str(raw), str(self.qcow2)], check=True)
        self.digest = hashing.of_file(self.qcow2)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    content = bytearray(SIZE)
    for number, (start, length) in enumerate(DATA.items()):
        content[start : start + length] = bytes([number + 1]) * length
    store = Store(tmp_path / "artifacts", Keys(signing=tmp_path / "key"))
    return Stored(tmp_path, bytes(content), PreparedDisks(tmp_path / "disks", store))


def test_the_same_bytes_and_the_same_holes(stored: Stored) -> None:
    assert stored.copy() == stored.content
    allocated = stored.volume.stat().st_blocks * 512
    assert sum(DATA.values()) <= allocated < sum(DATA.values()) + (1 << 20)
    # It is not needed any more.
    stored.qcow2.unlink()
    assert stored.copy() == stored.content
    assert [path.name for path in stored.disks.directory.iterdir()] == [stored.digest]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
def test_a_volume_that_cannot_be_written_past_the_cache(stored: Stored, memory: Path) -> None:
    volume = memory / "volume"
    with volume.open("wb") as file:
        file.truncate(SIZE)
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(volume, os.O_RDWR | os.O_DIRECT)
    stored.disks.copy(stored.qcow2, stored.digest, volume)
    assert volume.read_bytes() == stored.content


def test_a_disk_whose_end_is_within_a_block(tmp_path: Path) -> None:
    content = b"a" * 4096 + b"b" * 512
    stored = Stored(tmp_path, content, PreparedDisks(tmp_path / "disks", Store(tmp_path, Keys())))
    assert stored.copy()[: len(content)] == content


def test_a_stored_disk_that_was_changed(stored: Stored) -> None:
    data = bytearray(stored.qcow2.read_bytes())
    data[-1] ^= 1
    stored.qcow2.write_bytes(data)
    with pytest.raises(StoreError, match=r"is damaged: disk\.qcow2"):
        stored.copy()
    assert stored.volume.stat().st_blocks == 0
    assert list(stored.disks.directory.iterdir()) == []


@pytest.mark.parametrize("name", ["disk.raw", "pieces.json"])
@pytest.mark.parametrize("damage", ["changed", "cut off", "gone"])
def test_a_prepared_disk_that_is_damaged_is_made_again(stored: Stored, name: str, damage: str) -> None:
    stored.copy()
    file = stored.place / name
    if damage == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[2 << 20 if name == "disk.raw" else 20] ^= 1
        file.write_bytes(data if damage == "changed" else data[: len(data) // 8])
    assert stored.copy() == stored.content


def test_one_that_is_another(stored: Stored) -> None:
    stored.copy()
    other = "0" * 64
    stored.place.rename(stored.disks.directory / other)
    with pytest.raises(StoreError, match="is damaged"):
        stored.disks.copy(stored.qcow2, other, stored.volume)


def test_one_that_others_can_write(stored: Stored) -> None:
    stored.copy()
    stored.place.chmod(0o770)
    with pytest.raises(StoreError, match="can be changed by others"):
        stored.copy()
    assert stored.volume.stat().st_blocks == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_one_that_is_somebody_elses(stored: Stored) -> None:
    stored.copy()
    os.chown(stored.place, 1000, 1000)
    with pytest.raises(StoreError, match="can be changed by others"):
        stored.copy()


def test_those_of_versions_that_are_gone(stored: Stored) -> None:
    gone = stored.disks.directory / ("f" * 64)
    gone.mkdir(parents=True)
    theirs = stored.disks.directory / "theirs"
    theirs.mkdir()
    stored.copy()
    assert not gone.exists()
    assert theirs.exists()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that is nothing but a page cache."""
    directory = tmp_path / "memory"
    directory.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device that held something else before."""
    file = tmp_path / "device"
    file.write_bytes(b"\xaa" * SIZE)
    argv = ["losetup", "--find", "--show", str(file)]
    found = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(found)
    subprocess.run(["losetup", "--detach", found], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes block devices")
def test_a_block_device_has_zeros_in_the_holes(stored: Stored, device: Path) -> None:
    stored.disks.copy(stored.qcow2, stored.digest, device, blank=False)
    assert device.read_bytes() == stored.content
