"""Block devices that held somebody's data: what of it the next machine can read."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdibuild.disk import zeros
from vdibuild.errors import HostError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes block devices")

SIZE = 72 << 20
SECRET = b"secret" * 1000


@contextlib.contextmanager
def forgetful(directory: Path) -> Iterator[Path]:
    """A device that lets a range hold zeros when it is told to."""
    file = directory / "device"
    with file.open("wb") as made:
        made.truncate(SIZE)
    with _loop(file) as device:
        yield device


@contextlib.contextmanager
def plain(directory: Path) -> Iterator[Path]:
    """One that has to be written: its file is on a file system that makes no holes."""
    mounted = directory / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", mounted], check=True)
    try:
        with (mounted / "device").open("wb") as made:
            made.truncate(SIZE)
        with _loop(mounted / "device") as device:
            yield device
    finally:
        subprocess.run(["umount", mounted], check=True)


@contextlib.contextmanager
def _loop(file: Path) -> Iterator[Path]:
    argv: list[str | Path] = ["losetup", "--find", "--show", file]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def fill(device: Path) -> None:
    with device.open("r+b") as file:
        for start in (0, 1 << 20, 70 << 20, SIZE - len(SECRET)):
            file.seek(start)
            file.write(SECRET)


def test_a_device_that_forgets_by_itself(tmp_path: Path) -> None:
    with forgetful(tmp_path) as device:
        fill(device)
        assert zeros.by_itself(device)
        assert device.read_bytes().count(0) == SIZE
        assert (tmp_path / "device").stat().st_blocks == 0, "no zeros are written"
        fill(device)
        zeros.erase(device)
        assert device.read_bytes().count(0) == SIZE


def test_a_device_that_has_to_be_written(tmp_path: Path) -> None:
    with plain(tmp_path) as device:
        fill(device)
        before = device.read_bytes()
        assert not zeros.by_itself(device)
        assert device.read_bytes() == before
        zeros.erase(device)
        assert device.read_bytes().count(0) == SIZE


def test_a_device_that_cannot_be_written(tmp_path: Path) -> None:
    """A loop device that was read-only stays so for the next one who gets it: this one is none."""
    with pytest.raises(HostError, match="cannot be erased"):
        zeros.erase(Path("/dev/full"))
