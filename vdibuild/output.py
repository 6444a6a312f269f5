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


def sync(*paths: Path) -> None:
    """Make sure that files' contents, or directories' entries, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
