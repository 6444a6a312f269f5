"""The relay between QEMU's own SPICE server and a real viewer, and under attack. No guest is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests import spice as fakes
from tests.guest.screens import Viewer
from tests.spice import DISPLAY, USUAL, Broker, Certificates, Client, RelayProcess
from vdibuild.pool import screens, spice
from vdibuild.pool.control import End, Ended, Linked, Offer
from vdibuild.pool.spice import LinkMessage

SECONDS = 120.0


@dataclass
class Pool:
    """A relay, a broker, and machines that QEMU runs with nothing in them but their firmware."""

    directory: Path
    relay: RelayProcess
    ports: dict[str, int]
    certificates: Certificates
    broker: Broker
    machines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)

    async def machine(self, lease: str, stands_still: bool = False) -> None:
        """Start a machine; its password is the lease's name with `-real`.

        stands_still: its firmware does nothing, so that its screen never changes its size.
        """
        path = self.directory / lease
        secret = self.directory / f"{lease}.secret"
        secret.write_text(f"{lease}-real")
        self.machines[lease] = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults"),
                *("-vga", "std", "-display", "none", "-boot", "menu=on,splash-time=1"),
                *("-object", f"secret,id=password,file={secret}"),
                *("-qmp", f"unix:{path}.monitor,server=on,wait=off"),
                *("-spice", f"unix=on,addr={path},password-secret=password"),
                *("-device", "usb-ehci", "-chardev", "spicevmc,id=usb,name=usbredir"),
                *("-device", "usb-redir,chardev=usb"),
                *(["-S"] if stands_still else []),
            ],
            stdin=subprocess.DEVNULL,
        )
        async with asyncio.timeout(SECONDS):
            while not path.exists():
                await asyncio.sleep(0.02)

    async def screenshot(self, lease: str) -> Path:
        """A picture of what a machine itself shows."""
        file = self.directory / f"{lease}.png"
        monitor = QMPClient()
        await monitor.connect(str(self.directory / f"{lease}.monitor"))
        try:
            await monitor.execute("screendump", {"filename": str(file), "format": "png"})
        finally:
            await monitor.disconnect()
        return file

    async def offer(
        self,
        lease: str,
        station: str | None = "127.0.0.1",
        ticket: str | None = None,
        stands_still: bool = False,
    ) -> None:
        """Start a machine (see there) and offer it."""
        await self.machine(lease, stands_still)
        self.broker.tell(
            Offer.model_validate(
                {
                    "lease": lease,
                    "socket": self.directory / lease,
                    "password": f"{lease}-real",
                    "station": station,
                    "ticket": ticket,
                    "expires": SECONDS,
                }
            )
        )
        assert lease in {one.lease for one in (await self.broker.state()).offers}

    async def wait_linked(self, lease: str) -> None:
        while lease not in self.linked:
            await self._hear()

    async def wait_ended(self, lease: str) -> Ended:
        while lease not in self.ended:
            await self._hear()
        return self.ended[lease]

    async def _hear(self) -> None:
        async with asyncio.timeout(SECONDS):
            report = await self.broker.hears()
        if isinstance(report, Linked):
            self.linked.add(report.lease)
        if isinstance(report, Ended):
            self.ended[report.lease] = report

    async def channels(self, lease: str, number: int) -> None:
        """Wait until a session has so many channels."""
        async with asyncio.timeout(SECONDS):
            while True:
                sessions = {one.lease: one for one in (await self.broker.state()).sessions}
                if lease in sessions and sessions[lease].channels >= number:
                    return
                await asyncio.sleep(0.1)

    def client(self, source: str = "127.0.0.1") -> Client:
        return Client(self.ports, self.certificates.trusting(), source)


@contextlib.asynccontextmanager
async def pool(directory: Path) -> AsyncIterator[Pool]:
    made = fakes.certificates(directory)
    config, ports = fakes.with_free_ports(fakes.configuration(directory, made))
    relay = RelayProcess(config, directory)
    relay.start()
    running: Pool | None = None
    try:
        async with asyncio.timeout(SECONDS):
            broker = await fakes.connected(config.control)
        await broker.state()
        running = Pool(directory, relay, ports, made, broker)
        yield running
    finally:
        if running:
            running.broker.close()
            for process in running.machines.values():
                process.kill()
                process.wait()
        relay.stop()


@pytest.fixture
def display() -> Iterator[str]:
    """An X server with one screen."""
    with screens.x_server() as name:
        yield name


OLD = ("--spice-disable-audio", "--spice-disable-effects=animation", "-k", "--kiosk-quit=on-disconnect")
"""How the old client's script starts the viewer."""


def test_the_old_clients_viewer(tmp_path: Path, display: str) -> None:
    async def scene() -> None:
        async with pool(tmp_path) as running:
            await running.offer("one")
            url = f"spice://127.0.0.1:{running.ports['plain']}"
            viewer = Viewer(display, tmp_path, [url, *OLD])
            try:
                await running.wait_linked("one")
                await viewer.shows(lambda: running.screenshot("one"))
                await running.channels("one", 4)
                # The machine goes, and with it the viewer.
                running.machines["one"].kill()
                await viewer.ended()
                assert (await running.wait_ended("one")).reason == "the machine ended it"
            finally:
                viewer.stop()

    asyncio.run(scene())


def test_a_viewer_with_a_file_of_the_broker(tmp_path: Path, display: str) -> None:
    async def scene() -> None:
        async with pool(tmp_path) as running:
            await running.offer("one", station=None, ticket="ticket-1")
            await running.offer("two", station=None, ticket="ticket-2")
            ca = running.certificates.ca.read_text().replace("\n", "\\n")
            file = tmp_path / "machine.vv"
            file.write_text(
                "[virt-viewer]\ntype=spice\nhost=127.0.0.1\n"
                f"tls-port={running.ports['tls']}\npassword=ticket-2\nca={ca}\ndelete-this-file=1\n"
            )
            viewer = Viewer(display, tmp_path, [str(file), "--kiosk", "--kiosk-quit=on-disconnect"])
            try:
                await running.wait_linked("two")
                await viewer.shows(lambda: running.screenshot("two"))
                await running.channels("two", 4)
                assert not file.exists()
                # The person leaves, and with them the lease.
                viewer.process.terminate()
                await viewer.ended()
                ended = await running.wait_ended("two")
                assert ended.reason.startswith("the client ") and ended.bytes_out > 5_000
                assert [one.lease for one in (await running.broker.state()).offers] == ["one"]
            finally:
                viewer.stop()
            log = running.relay.log.read_text()
            assert "lease=two linked" in log and "ticket-" not in log and "-real" not in log

    asyncio.run(scene())


def test_a_viewer_stays_while_the_relay_is_replaced(tmp_path: Path, display: str) -> None:
    async def scene() -> None:
        async with pool(tmp_path) as running:
            await running.offer("one")
            old = running.relay.processes[-1]
            url = f"spice://127.0.0.1:{running.ports['plain']}"
            viewer = Viewer(display, tmp_path, [url, *OLD])
            try:
                await running.wait_linked("one")
                await viewer.shows(lambda: running.screenshot("one"))
                await running.channels("one", 4)
                running.relay.start()
                await running.broker.hung_up()
                running.broker.close()
                running.broker = await fakes.connected(running.relay.config.control)
                assert [one.lease for one in (await running.broker.state()).sessions] == ["one"]
                assert viewer.process.poll() is None and old.poll() is None
                running.broker.tell(End(lease="one", reason="time is up"))
                await viewer.ended()
                assert (await running.wait_ended("one")).reason == "time is up"
                assert old.wait(SECONDS) == 0
            finally:
                viewer.stop()

    asyncio.run(scene())


def test_qemu_is_not_frozen_by_who_is_not_let_in(tmp_path: Path) -> None:
    """A display channel without its DISPLAY_INIT freezes QEMU for 30 s when a second client links."""

    async def scene() -> None:
        async with pool(tmp_path) as running:
            # One that changes the size of its screen meanwhile is frozen by its own client, as QEMU is made.
            await running.offer("one", stands_still=True)
            await running.offer("two", station="127.0.0.2", stands_still=True)
            await running.screenshot("one")
            client, other = running.client(), running.client("127.0.0.2")
            main, undisturbed = await client.link(), await other.link()
            display = await client.link(main.identifier, DISPLAY)
            assert display.error == 0
            assert (await client.link()).error == spice.LinkError.PERMISSION_DENIED
            began = time.monotonic()
            inputs = await client.link(main.identifier, channel=3)
            cursor = await other.link(undisturbed.identifier, DISPLAY)
            assert (inputs.error, cursor.error) == (0, 0)
            assert time.monotonic() - began < 5
            client.close()
            other.close()

    asyncio.run(scene())


def test_floods_cost_little_memory_and_disturb_nobody(tmp_path: Path) -> None:
    async def scene() -> None:
        async with pool(tmp_path) as running:
            await running.offer("one", station="127.0.0.1")
            await running.offer("two", station="127.0.0.2")
            main = await running.client().link()
            before = running.relay.memory()
            strangers = [running.client(f"127.0.1.{number}") for number in range(1, 21)]
            held = [await one.connect() for one in strangers for _ in range(80)]
            for number, (_, writer) in enumerate(held):
                with contextlib.suppress(OSError):
                    if number % 2:
                        writer.write(os.urandom(4096))
                    else:
                        message = LinkMessage(number, DISPLAY, 0, USUAL)
                        writer.write(spice.build_link(message)[: number % 60])
            began = time.monotonic()
            station = await running.client("127.0.0.2").link()
            assert station.error == 0
            further = await running.client().link(main.identifier, channel=3)
            assert further.error == 0
            assert time.monotonic() - began < 5
            assert running.relay.memory() - before < 64 << 20
            for _, writer in held:
                writer.close()

    asyncio.run(scene())


def test_a_ticket_is_not_the_machines_password(tmp_path: Path) -> None:

    async def scene() -> None:
        async with pool(tmp_path) as running:
            await running.offer("one", station=None, ticket="ticket")
            reader, writer = await asyncio.open_unix_connection(running.directory / "one")
            writer.write(spice.build_link(LinkMessage(0, spice.MAIN_CHANNEL, 0, USUAL)))
            size = spice.parse_header(await reader.readexactly(16))
            reply = spice.parse_reply(await reader.readexactly(size))
            writer.write(spice.word(1) + spice.encrypt_ticket("ticket", reply.key))
            assert spice.parse_word(await reader.readexactly(4)) == spice.LinkError.PERMISSION_DENIED
            writer.close()

    asyncio.run(scene())
