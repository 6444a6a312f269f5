"""Temporary directories beside what they are for: removed at the end, or, after a crash, by the next run."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path

from vdibuild import tree

_LOCK = ".in-use-by-vdibuild"
"""Our mark: without it only what is empty is removed. Whoever works in the directory holds a lock on it."""

_NAME_DIGITS = 8


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A new directory on the file system of `output`, for as long as the block runs.

    Those that killed runs left for the same output are removed first.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_left(output)
    with contextlib.ExitStack() as until_removed:
        # The name is there before the directory: an interrupt can come between any two lines.
        directory = _unused_name(output)
        try:
            while not _made(directory, until_removed):
                directory = _unused_name(output)
            yield directory
        finally:
            _remove(directory)


def remove_left(output: Path) -> None:
    """Remove the directories that killed runs left for an output (see `beside`)."""
    for left in output.parent.glob(f"{_escaped(f'.{output.name}-')}{'[0-9a-f]' * _NAME_DIGITS}"):
        _remove_unused(left)


def _unused_name(output: Path) -> Path:
    return output.parent.absolute() / f".{output.name}-{secrets.token_hex(_NAME_DIGITS // 2)}"


def _made(directory: Path, until_removed: contextlib.ExitStack) -> bool:
    """Make a directory, and hold its lock. False: before that, another run took it for one that was left."""
    directory.mkdir(mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        lock = until_removed.enter_context((directory / _LOCK).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
    return (directory / _LOCK).exists()


def _remove_unused(directory: Path) -> None:
    # Killed before its mark was made, or after its mark, the last file in it, was removed.
    with contextlib.suppress(OSError):
        directory.rmdir()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), (directory / _LOCK).open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another run is at work in it
        _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a directory, its mark after all else: a run can be killed while it removes."""
    with contextlib.suppress(FileNotFoundError):
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                tree.remove(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (directory / _LOCK).unlink(missing_ok=True)
        directory.rmdir()


def _escaped(name: str) -> str:
    """A name for a glob pattern."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
