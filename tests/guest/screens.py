"""What a person sees at a station, and whether it is what the machine shows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

SECONDS = 120.0
WIDTH, HEIGHT = 1024, 768
ALIKE = 0.9
"""How strongly the letters of the machine and of the viewer correlate; other text stays below a half."""

_TITLE = 64  # pixels at the top of the viewer's window that are not the machine's
_SAMPLED = 160, 60


@contextlib.contextmanager
def x_server() -> Iterator[str]:
    """An X server with one screen, by its display's name."""
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as number:
            name = f":{number.readline().strip()}"
        yield name
    finally:
        server.terminate()
        server.wait()


class Viewer:
    """A remote-viewer on a screen of its own."""

    def __init__(self, display: str, directory: Path, arguments: Sequence[str]) -> None:
        self._environment = {**os.environ, "DISPLAY": display, "HOME": str(directory), "GDK_BACKEND": "x11"}
        self._directory = directory
        self.process = subprocess.Popen(
            ["remote-viewer", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def shows(self, screen: Callable[[], Awaitable[Path]]) -> None:
        """Wait until the viewer's window shows the text that the machine shows.

        screen: takes a picture of the machine's own screen.
        """
        async with asyncio.timeout(SECONDS):
            while not alike(_letters(await screen(), 0), _letters(self.picture(), _TITLE)):
                assert self.process.poll() is None, "the viewer ended"
                await asyncio.sleep(0.5)

    def picture(self) -> Path:
        """A picture of the viewer's whole screen."""
        file = self._directory / "seen.png"
        subprocess.run(
            ["import", "-window", "root", str(file)], env=self._environment, check=True, timeout=60
        )
        return file

    async def ended(self) -> None:
        async with asyncio.timeout(SECONDS):
            while self.process.poll() is None:
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def alike(one: bytes, other: bytes) -> bool:
    """Whether two pictures of letters are of the same ones; never where there are none."""
    if min(len(set(one)), len(set(other))) < 2:
        return False
    return statistics.correlation(one, other) > ALIKE


def _letters(picture: Path, top: int) -> bytes:
    """Where a picture is light, all of one size: the viewer scales the machine's screen to its window.

    top: how many lines of pixels at the top do not count.
    """
    width, height = _SAMPLED
    argv = [
        *("convert", str(picture), "-crop", f"+0+{top}", "+repage", "-colorspace", "gray"),
        *("-threshold", "35%", "-trim", "+repage", "-resize", f"{width}x{height}!", "-depth", "8", "gray:-"),
    ]
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout
