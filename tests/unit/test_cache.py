from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from vdibuild import cache
from vdibuild.settings.keys import Keys
from vdibuild.store import Store

OLD, YOUNG = 31 * 86400, 29 * 86400
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def put(path: Path, age: int) -> Path:
    """A file of 8 KiB in a place of that age, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 8192)
    (path.parent / ".lock").touch()
    for used in (path, path.parent):
        os.utime(used, (time.time() - age,) * 2)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts", Keys())


def test_what_nobody_misses_is_removed_and_said(tmp_path: Path, store: Store) -> None:
    directory = tmp_path / "cache"
    gone = [
        put(directory / "disks" / ONE / "disk.raw", 0),
        put(directory / "bundles" / ONE / "bundle.tar.zst", OLD),
        put(directory / "media" / TWO / "Fedora.iso", OLD),
        put(directory / "downloads/debian-trixie/http_mirror/archives/old_1_all.deb", OLD),
    ]
    kept = [
        put(directory / "bundles" / TWO / "bundle.tar.zst", YOUNG),
        put(directory / "bundles/mine/notes", OLD),
        put(directory / "downloads/debian-trixie/http_mirror/archives/new_1_all.deb", YOUNG),
        put(directory / "downloads/debian-trixie/http_mirror/lists/Packages", OLD),
        put(directory / "steps" / THREE / "disk.raw", OLD),
    ]
    said = cache.clear(directory, store)
    assert [(one.name, one.reason) for one in said] == [
        ("disks/111111111111", "its version is gone"),
        ("bundles/111111111111 bundle.tar.zst", "not used for 30 days"),
        ("media/222222222222 Fedora.iso", "not used for 30 days"),
        ("downloads/debian-trixie/http_mirror 1 packages", "not installed for 30 days"),
    ]
    assert all(one.size == 8192 for one in said)
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    assert not gone[1].parent.exists()
    assert cache.clear(directory, store) == []


def test_what_is_being_fetched_stays(tmp_path: Path, store: Store) -> None:
    part = put(tmp_path / "bundles" / ONE / "bundle.tar.zst.part", OLD)
    with (part.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(part.parent, (time.time() - OLD,) * 2)
        assert cache.clear(tmp_path, store) == []
    assert part.exists()


def test_no_cache_yet(tmp_path: Path, store: Store) -> None:
    assert cache.clear(tmp_path / "cache", store) == []
    assert not (tmp_path / "cache").exists()
