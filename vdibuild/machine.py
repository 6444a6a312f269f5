"""A throw-away machine: QEMU on an overlay of a disk, started directly, without libvirt.

It reaches no network (QEMU's own DHCP server answers, nothing else), writes nothing to the disk it was
given, and dies with whoever started it. The disk's content is untrusted: the machine runs in QEMU's sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu.qmp import EventListener, QMPClient, QMPError

from vdibuild import process, progress
from vdibuild.agent import CHANNEL, Agent
from vdibuild.errors import HostError, VerificationError

EMULATORS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
"""QEMU's names: everywhere, and on EL."""

FIRMWARE_DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
"""Where UEFI firmware describes itself, best first (docs/interop/firmware.json in QEMU's source)."""

_KEPT = 1 << 20  # characters of the console's output: an untrusted guest may print for ever
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?!]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9]|[=>c78])|[\r\0]")


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of. memory: MiB. accelerator: see host.accelerator."""

    firmware: Literal["bios", "uefi"]
    memory: int
    accelerator: Literal["kvm", "tcg"]
    cores: int = 1


@dataclass(frozen=True)
class Firmware:
    """UEFI firmware of this host: the program, a template of its variables, and their image format."""

    code: Path
    code_format: str
    variables: Path
    variables_format: str


class Console:
    """What a machine prints on its serial port, without the terminal's escape sequences."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines = ""
        self._partial = b""
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        """What was printed last, about a megabyte at most."""
        return self._lines + _printable(self._partial)

    def tail(self, lines: int = process.TAIL_LINES) -> list[str]:
        """The last lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()][-lines:]

    async def shows(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait until something that was printed matches."""
        while True:
            self._changed.clear()
            if match := pattern.search(self.text):
                return match
            await self._changed.wait()

    async def follow(self, output: asyncio.StreamReader) -> None:
        """Read the port until the machine is gone; every line goes to the log."""
        # QEMU resets the connection when it ends with output unsent.
        with contextlib.suppress(ConnectionError):
            while data := await output.read(65536):
                *lines, self._partial = (self._partial + data).split(b"\n")
                self._partial = self._partial[-_KEPT:]
                for line in map(_printable, lines):
                    progress.log(f"{self._name}| {line}")
                    self._lines = f"{self._lines[-_KEPT:]}{line}\n"
                self._changed.set()


class Machine:
    """A running machine: its console, its guest agent, its monitor (see `started`)."""

    def __init__(self, name: str, qemu: subprocess.Popen[bytes], directory: Path) -> None:
        self.name = name
        self.console = Console(name)
        self.agent = Agent(name)
        self._qemu = qemu
        self._directory = directory
        self._monitor = QMPClient(f"{name}-monitor")
        self._events = EventListener(names={"VSERPORT_CHANGE", "SHUTDOWN"})
        self._monitor.register_listener(self._events)
        self._agent_opened = asyncio.Event()
        self._shutdown = ""

    async def answering(self) -> None:
        """Wait until the guest agent answers."""
        await self._agent_opened.wait()
        await self.agent.synchronise()

    async def ended(self) -> str:
        """Wait until the machine ends by itself; returns why."""
        status = await _exit_status(self._qemu)
        if self._shutdown:
            return self._shutdown
        return self._complaint() or f"QEMU ended with status {status}"

    async def screen(self, file: Path, form: Literal["png", "ppm"] = "png") -> None:
        """Save what the screen shows just now."""
        # QEMU writes in its own directory; what it wrote is moved only when it is whole.
        shot = self._directory / f"screen.{form}"
        await self._monitor.execute("screendump", {"filename": str(shot), "format": form})
        shutil.move(shot, file)

    async def _attach(self, monitor: socket.socket, agent: socket.socket, console: socket.socket) -> None:
        try:
            await self._monitor.connect(monitor)
        except (QMPError, OSError, EOFError):
            status = await _exit_status(self._qemu)
            raise HostError(
                f"QEMU did not start: {self._complaint() or f'status {status}'}", "see `./inv doctor`"
            ) from None
        await self.agent.connect(agent)
        output, _ = await asyncio.open_unix_connection(sock=console)
        await asyncio.gather(self.console.follow(output), self._watch())

    async def _watch(self) -> None:
        async for event in self._events:
            data = event["data"]
            if event["event"] == "SHUTDOWN":
                self._shutdown = f"the guest ended by itself ({data['reason']})"
            elif data["open"] and data["id"] == "agent":
                self._agent_opened.set()

    async def _detach(self) -> None:
        await self.agent.close()
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._monitor.disconnect()

    def _complaint(self) -> str:
        lines = (self._directory / "qemu.log").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")
