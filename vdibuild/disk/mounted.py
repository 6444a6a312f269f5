"""Unpacks an archive onto file systems of a disk that it mounts: a program for a mount namespace of its own.

It imports nothing of the package. Its arguments are an empty directory, the disk, and for each file system
its place on the disk (`OFFSET+SIZE`, bytes) and its mount point, `/` first; then `--` and tar with its
options to unpack. The archive comes on standard input. tar takes the program's place: when it ends, so does
the namespace, and with it the mounts and their loop devices, which nothing else knows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def command(
    directory: Path, disk: Path, places: Sequence[tuple[int, int, str]], tar: Sequence[str]
) -> list[str]:
    """The argument list; to be run through tree.host_command. places: offset, size (bytes), mount point."""
    words = [word for offset, size, mountpoint in places for word in (f"{offset}+{size}", mountpoint)]
    return [sys.executable, "-I", "-S", __file__, str(directory), str(disk), *words, "--", *tar]


def _unpack(arguments: Sequence[str]) -> None:
    end = arguments.index("--")
    directory, disk = arguments[:2]
    for place, mountpoint in zip(arguments[2:end:2], arguments[3:end:2], strict=True):
        offset, _, size = place.partition("+")
        at = directory + mountpoint
        os.makedirs(at, exist_ok=True)  # noqa: PTH103 (a program on its own)
        options = f"loop,offset={offset},sizelimit={size},noatime"
        subprocess.run(["mount", "-t", "ext4", "-o", options, disk, at], check=True, stdin=subprocess.DEVNULL)
    tar = arguments[end + 1 :]
    os.execvp(tar[0], [*tar, f"--directory={directory}"])  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    _unpack(sys.argv[1:])
