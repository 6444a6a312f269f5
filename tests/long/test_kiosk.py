"""A station from its start as a CD to a session, and after it; pictures of all its screens.

It needs a kiosk that is built: the ISO $VDIBUILD_KIOSK, or else the current one in the store of
$VDIBUILD_SITE. It is started once; under emulation that takes minutes. The pictures go to $VDIBUILD_PICTURES,
if that is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests import pool as pools
from tests.unit import test_signal_port
from vdibuild import host, kiosk, machine, process, site, station
from vdibuild.live import ISO
from vdibuild.machine import Console
from vdibuild.store import Store

SECONDS = 1200.0
SERVER = "10.0.2.100"  # in the network that QEMU makes up for its guest
SPICE_PORT = 5906
VGA_GREY = b"\xaa\xaa\xaa"
"""The usual colour of letters on a VGA text screen."""


class Guest:
    """The machine that the station runs on."""

    def __init__(self, directory: Path, monitor: QMPClient, console: Console) -> None:
        self._directory = directory
        self._monitor = monitor
        self.console = console
        self._seen = 0

    async def says(self, text: str, key: str = "") -> None:
        """Wait until the station says something, after what was waited for before.

        key: one that is pressed until then, again and again: before its window has the focus, a station
        hears none.
        """
        pattern = re.compile(f"(?s).{{{self._seen}}}.*?{re.escape(text)}")
        saying = asyncio.create_task(self.console.shows(pattern))
        try:
            while not saying.done():
                if key:
                    keys = [{"type": "qcode", "data": key}]
                    await self._monitor.execute("send-key", {"keys": keys})
                await asyncio.wait((saying,), timeout=2 if key else None)
        finally:
            saying.cancel()
        self._seen = saying.result().end()

    async def picture(self, name: str) -> bytes:
        """The screen's pixels; the picture is kept."""
        picture = kept(self._directory) / f"{name}.png"
        await self._monitor.execute("screendump", {"filename": str(picture), "format": "png"})
        pixels = self._directory / "screen.ppm"
        await self._monitor.execute("screendump", {"filename": str(pixels)})
        return pixels.read_bytes()


def kept(directory: Path) -> Path:
    """Where the pictures and the console's text go."""
    return Path(os.environ.get("VDIBUILD_PICTURES", directory))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The kiosk, told where its server is."""
    if "VDIBUILD_KIOSK" in os.environ:
        built = Path(os.environ["VDIBUILD_KIOSK"])
    else:
        loaded = site.load(Path(os.environ.get("VDIBUILD_SITE", site.DEFAULT_NAME)))
        built = Store(loaded.artifacts_directory, loaded.keys).get(site.KIOSK).path / ISO
    shutil.copyfile(built, tmp_path / ISO)
    (tmp_path / ISO).chmod(0o644)
    kiosk.configure(tmp_path / ISO, {"server_ip": SERVER, "vdi_spice_port": str(SPICE_PORT)})
    return tmp_path / ISO


@contextlib.asynccontextmanager
async def started(image: Path, directory: Path, forwards: dict[int, int]) -> AsyncIterator[Guest]:
    """Start it as a CD. forwards: ports of 127.0.0.1 by those of the server; it reaches nothing else."""
    ours, theirs = {}, {}
    for channel in ("monitor", "agent", "console"):
        ours[channel], theirs[channel] = socket.socketpair()
    hardware = machine.Hardware("bios", 1024, host.accelerator().name, cores=2, medium="cdrom")
    drive = machine._read_only(image, "raw", "cdrom")
    argv = machine.command(hardware, drive, directory, {key: end.fileno() for key, end in theirs.items()})
    ports = "".join(
        f",guestfwd=tcp:{SERVER}:{port}-cmd:ncat 127.0.0.1 {target}" for port, target in forwards.items()
    )
    argv = [f"{word}{ports}" if word.startswith("user,id=network") else word for word in argv]
    # What carries the ports is a process of its own.
    argv = [word.replace(",spawn=deny", "") for word in argv]
    qemu = process.start(
        argv, stdout=subprocess.DEVNULL, pass_fds=tuple(end.fileno() for end in theirs.values())
    )
    console = Console("station")
    monitor = QMPClient("station")
    try:
        for end in theirs.values():
            end.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours["console"])
        following = asyncio.create_task(console.follow(reader))
        await monitor.connect(ours["monitor"])
        yield Guest(directory, monitor, console)
        await monitor.disconnect()
        following.cancel()
        writer.close()
    finally:
        process.stop(qemu)
        ours["agent"].close()
        (kept(directory) / "console.txt").write_text(console.text)


@contextlib.contextmanager
def spice_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A machine with nothing in it but its firmware, which says so on its screen."""
    argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults"]
    argv += ["-vga", "std", "-display", "none"]
    argv += ["-spice", f"port={port},addr=127.0.0.1,disable-ticketing=on"]
    running = process.start(argv, stdout=subprocess.DEVNULL)
    try:
        yield running
    finally:
        process.stop(running)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port: int = unused.getsockname()[1]
        return port


def greys(pixels: bytes) -> int:
    """How many pixels have the colour of a text screen's letters (PPM: three bytes each)."""
    body = pixels.split(b"\n", 3)[3]
    return Counter(body[place : place + 3] for place in range(0, len(body), 3))[VGA_GREY]


def test_a_session(image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        there = pools.desk(tmp_path)
        behind = free_port()
        links: list[asyncio.Task[None]] = []

        async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Carry a SPICE connection, and tell the broker of it, as the relay does."""
            for one in there.leases.living(pools.POOL):
                if one.linked is None and one.offered is not None:
                    there.broker.linked(one.lease, "127.0.0.1")
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", behind)
            links.append(asyncio.create_task(carry(other_reader, writer)))
            await carry(reader, other_writer)

        with spice_server(behind) as server:
            carrier = await asyncio.start_server(link, "127.0.0.1", 0)
            spice: int = carrier.sockets[0].getsockname()[1]
            async with (
                carrier,
                test_signal_port.serving(there) as signal,
                started(image, tmp_path, {5905: signal, SPICE_PORT: spice}) as guest,
                asyncio.timeout(SECONDS),
            ):
                await guest.says(station.UP)
                assert greys(await guest.picture("welcome")) == 0
                await guest.says("screen: One moment", key="ret")
                await guest.says("screen: All computers are in use | You are number 1 in line")
                await asyncio.sleep(2)  # GTK draws
                assert greys(await guest.picture("in-line")) == 0
                there.clean()
                await guest.says("the viewer begins")
                while greys(await guest.picture("session")) < 100:
                    await asyncio.sleep(1)
                # The machine is gone: the session ends, and the station begins anew.
                process.stop(server)
                await guest.says("the viewer ended with status 0")
                await guest.says(station.UP)
                assert greys(await guest.picture("afterwards")) == 0

    asyncio.run(run())


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
