"""Files under way: removed again when making them fails, and a full disk said in plain words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vdibuild.errors import CommandError, HostError


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[None]:
    """Remove the output when the block fails. Raises HostError when that was for want of space."""
    try:
        yield
    except BaseException as error:
        output.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if isinstance(error, CommandError):
            full = any("No space left on device" in line for line in error.tail)
        if full:
            raise HostError(f"no space left in {output.parent}", "free some space, then run again") from error
        raise


def replace(path: Path, text: str, mode: int = 0o666) -> None:
    """Let a file hold this text: whoever reads it has all of the old one or all of the new one.

    On return it is on the disk itself. mode: of the file, less the umask. What a killed run leaves is at
    `under_way(path)`, and of no harm.
    """
    new = under_way(path)
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync(path.parent)


def under_way(path: Path) -> Path:
    """Where `replace` writes first: a name that no program takes for one of its files."""
    return path.with_name(f".{path.name}.new")


def sync(*paths: Path) -> None:
    """Make sure that files' contents, or directories' entries, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
