"""Sets times of files that are listed: a program for where a tree's files belong to others.

It imports nothing of the package. Its arguments are a directory and a file of paths and times (nanoseconds
since 1970), each ended by a zero byte.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def command(directory: Path, listed: Path) -> list[str]:
    """The argument list that sets the times of files below a directory."""
    return [sys.executable, "-I", "-S", __file__, str(directory), str(listed)]


def write(times: Mapping[bytes, int], listed: Path) -> None:
    """Write a list for the program: times by path."""
    listed.write_bytes(b"".join(b"%b\0%d\0" % pair for pair in times.items()))


def _set(arguments: Sequence[str]) -> None:
    words = Path(arguments[1]).read_bytes().split(b"\0")
    os.chdir(arguments[0])
    for path, time in zip(words[::2], words[1::2], strict=False):
        if os.path.lexists(path):
            found = os.lstat(path)
            os.utime(path, ns=(found.st_atime_ns, int(time)), follow_symlinks=False)


if __name__ == "__main__":
    _set(sys.argv[1:])
