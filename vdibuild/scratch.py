"""Temporary directories beside what they are for: removed at the end, or, after a crash, by the next run."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path

from vdibuild import tree

_LOCK = ".in-use-by-vdibuild"
"""Our mark: without it nothing is removed. Whoever works in the directory holds a lock on it."""


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A new directory on the file system of `output`, for as long as the block runs.

    Those that killed runs left for the same output are removed first.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_left(output)
    # The name is there before the directory: an interrupt can come between any two lines.
    directory = output.parent.absolute() / f".{output.name}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as until_removed:
        try:
            directory.mkdir(mode=0o700)
            unmarked = directory / f"{_LOCK}.new"
            lock = until_removed.enter_context(unmarked.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever finds the mark finds it locked.
            unmarked.rename(directory / _LOCK)
            yield directory
        finally:
            tree.remove(directory)


def remove_left(output: Path) -> None:
    """Remove the directories that killed runs left for an output (see `beside`)."""
    for left in output.parent.glob(f"{_escaped(f'.{output.name}-')}*/{_LOCK}"):
        _remove_unused(left.parent)


def _remove_unused(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError), (directory / _LOCK).open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another run is at work in it
        tree.remove(directory)


def _escaped(name: str) -> str:
    """A name for a glob pattern."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
