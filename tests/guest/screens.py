"""What a person sees at a station, and whether it is what the machine shows."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vdibuild.pool import screens

SECONDS = 120.0

_VIEWED = range(64, screens.HEIGHT)  # the lines of the viewer's screen that are the machine's: not the title


class Viewer:
    """A remote-viewer on a screen of its own."""

    def __init__(self, display: str, directory: Path, arguments: Sequence[str]) -> None:
        self._display = display
        self._directory = directory
        self.process = subprocess.Popen(
            ["remote-viewer", *arguments],
            env={**os.environ, "DISPLAY": display, "HOME": str(directory), "GDK_BACKEND": "x11"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def shows(self, screen: Callable[[], Awaitable[Path]]) -> None:
        """Wait until the viewer's window shows the text that the machine shows.

        screen: takes a picture of the machine's own screen.
        """
        async with asyncio.timeout(SECONDS):
            while not screens.alike(await screen(), self.picture(), _VIEWED):
                assert self.process.poll() is None, "the viewer ended"
                await asyncio.sleep(0.5)

    def picture(self) -> Path:
        """A picture of the viewer's whole screen."""
        file = self._directory / "seen.png"
        screens.take(self._display, file)
        return file

    async def ended(self) -> None:
        async with asyncio.timeout(SECONDS):
            while self.process.poll() is None:
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
