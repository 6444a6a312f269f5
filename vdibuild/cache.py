"""The site's cache, and what of it nobody will miss: all of it is made or fetched again when it is wanted.

CACHE/disks/SHA256/                     a version's disk without its compression (provision.prepared)
CACHE/bundles/SHA256/, media/SHA256/    what was fetched (media.fetch)
CACHE/downloads/*/*/archives/*.deb      packages (families.mmdebstrap)
CACHE/steps/                            looks after itself (Steps.sweep)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vdibuild import tree
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.store import Store

_UNUSED_SECONDS = 30 * 86400


@dataclass(frozen=True)
class Cleared:
    """Something that is gone from the cache. name: for people. size: bytes that it took. reason: why."""

    name: str
    size: int
    reason: str


def clear(directory: Path, store: Store) -> list[Cleared]:
    """Remove what nobody will miss from a cache: disks of versions that are gone from the store, and what has
    not been used for 30 days. What is being fetched stays.
    """
    disks = PreparedDisks(directory / "disks", store)
    cleared = [
        Cleared(f"disks/{place.name[:12]}", _remove(place), "its version is gone")
        for place in disks.unneeded()
    ]
    for kind in ("bundles", "media"):
        for place in sorted(lock.parent for lock in (directory / kind).glob(f"{'?' * 64}/.lock")):
            with _idle(place) as idle:
                if idle and _is_old(place):
                    name = ", ".join(sorted(file.name for file in place.iterdir() if file.name[0] != "."))
                    reason = "not used for 30 days"
                    cleared.append(Cleared(f"{kind}/{place.name[:12]} {name}", _remove(place), reason))
    for archives in sorted((directory / "downloads").glob("*/*/archives")):
        old = [file for file in archives.glob("*.deb") if _is_old(file)]
        size = sum(_remove(file) for file in old)
        if old:
            name = str(archives.parent.relative_to(directory))
            cleared.append(Cleared(f"{name} {len(old)} packages", size, "not installed for 30 days"))
    return cleared


@contextlib.contextmanager
def _idle(place: Path) -> Iterator[bool]:
    """Whether nobody fetches into a place; nobody begins to within the block (media.fetch)."""
    with (place / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _UNUSED_SECONDS
    except FileNotFoundError:
        return False


def _remove(path: Path) -> int:
    """Remove a file or a directory; returns the bytes that it took."""
    size = 0
    for directory, _, files in os.walk(path):
        size += sum((Path(directory) / name).lstat().st_blocks * 512 for name in files)
    if path.is_dir():
        tree.remove(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_blocks * 512
            path.unlink()
    return size
