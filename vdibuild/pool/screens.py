"""Screens without a monitor: an X server in memory, its picture, and whether two pictures show one text."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from vdibuild import process
from vdibuild.errors import HostError

WIDTH, HEIGHT = 1024, 768

ALIKE = 0.9
"""How strongly pictures of one text correlate; those of other texts stay below a half."""

_SAMPLED = 160, 60


@contextlib.contextmanager
def x_server() -> Iterator[str]:
    """An X server with one screen, by its display's name. Raises HostError."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as number:
        server = process.start(
            ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp"],
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
        )
        os.close(writing)
        try:
            name = number.readline().strip()
            if not name:
                raise HostError("Xvfb does not start")
            yield f":{name}"
        finally:
            process.stop(server)


def take(display: str, file: Path) -> None:
    """Save a picture of what a display shows."""
    process.run(["import", "-window", "root", str(file)], env={"DISPLAY": display}, deadline=60)


def alike(one: Path, other: Path, lines: range | None = None) -> bool:
    """Whether two pictures show the same text, of whatever size; never where there is none.

    lines: which lines of pixels of the second one count; by default all.
    """
    samples = [_letters(one), _letters(other, lines)]
    if min(len(set(sample)) for sample in samples) < 2:
        return False
    return statistics.correlation(*samples) > ALIKE


def written(picture: Path) -> int:
    """How many pixels of a picture are light: more, when more is written."""
    return _convert(picture).count(255)


def _letters(picture: Path, lines: range | None = None) -> bytes:
    """Where a picture is light, from its first light pixel to its last, all of one size."""
    width, height = _SAMPLED
    cropped = ["-crop", f"x{len(lines)}+0+{lines.start}", "+repage"] if lines else []
    sampled = ["-trim", "+repage", "-resize", f"{width}x{height}!"]
    return _convert(picture, cropped, sampled)


def _convert(picture: Path, before: Sequence[str] = (), after: Sequence[str] = ()) -> bytes:
    """A picture in black and white, as bytes 0 and 255; before, after: what else ImageMagick does to it."""
    light = ["-colorspace", "gray", "-threshold", "35%"]
    argv = ["convert", str(picture), *before, *light, *after, "-depth", "8", "gray:-"]
    with contextlib.ExitStack() as stack:
        converting = process.start(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        stack.callback(process.stop, converting)
        output, _ = converting.communicate(timeout=60)
    return output
