"""A pool as it is served, stations that come and go, and whatever can be killed being killed meanwhile.

The stations do what the old client does, with connections of their own in place of ncat and remote-viewer:
they wait at the signal port, link to the SPICE port, and there QEMU itself tells them its UUID, as it does
any viewer. Each then looks into its machine through the agent, and leaves a mark that nobody may ever find.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import libvirt

from tests.guest import desktop, libvirtd
from tests.guest.conftest import PROGRAM, SiteDirectory
from tests.guest.libvirtd import Libvirt
from tests.spice import DISPLAY, Client, Link
from vdibuild.pool import spice
from vdibuild.pool.leases import Leases, State
from vdibuild.pool.signal_port import PHRASE

_Answer = TypeVar("_Answer")

POOL = "desktop"
IMAGE = "debian-13"
MACHINE_DISK = 8  # MiB
DISK = 200  # MiB for all of the pool
SERVED_SECONDS = 180.0
"""How long a station may have to wait, whatever happens."""

_SITE = f"""
images:
  {IMAGE}: {{family: debian, release: trixie, kickstart: golden-debian.ks.j2}}
keys: {{signing: key/signing}}
"""
_MAIN_UUID = 114  # SPICE_MSG_MAIN_UUID (spice/enums.h)
_DISPLAY_INIT = struct.pack("<HIBqBi", 101, 14, 1, 1 << 20, 1, 1 << 20)  # SPICE_MSGC_DISPLAY_INIT
_KEY_DOWN = struct.pack("<HII", 101, 4, 0x1E)  # SPICE_MSGC_INPUTS_KEY_DOWN, of A
_MARKED = 4096
_NO_TLS = ssl.create_default_context()
_SILENCE_SECONDS = 5.0
_LOOK_SECONDS = 60.0
_RESTART_SECONDS = 1.0
_LINGER = struct.pack("ii", 1, 0)  # close() resets the connection (socket(7))


@dataclass(frozen=True)
class Size:
    """How many stations there are, and machines: kept clean, and in all."""

    stations: int
    clean: int
    maximum: int


SMALL, LARGE = Size(4, 2, 5), Size(8, 4, 10)


@dataclass(frozen=True)
class Visit:
    """A session that a station had. lease: of the machine that it got. seen: it was looked into."""

    station: str
    lease: str
    seen: bool


@dataclass
class Pool:
    """A pool that is served by processes of its own. ports: of signals and of screens."""

    site: SiteDirectory
    system: Libvirt
    size: Size
    ports: tuple[int, int]
    leases: Leases
    log: Path
    served: subprocess.Popen[bytes] | None = None
    stopping: bool = False
    visits: list[Visit] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)
    waits: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    most: int = 0

    @property
    def directory(self) -> Path:
        """The pool's own, on a small disk."""
        return self.system.directory / "pools" / POOL

    async def serve(self) -> None:
        """Keep the service running, as systemd does."""
        command = self.system.inside(["env", f"--chdir={self.site.path}", *PROGRAM, "pool.serve"])
        while not self.stopping:
            with self.log.open("ab") as log:
                self.served = subprocess.Popen(
                    command,
                    env=self.site.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            await asyncio.to_thread(self.served.wait)
            if not self.stopping:
                await asyncio.sleep(_RESTART_SECONDS)

    async def kill_service(self) -> None:
        """Kill the service; another one is started."""
        self._end_service(signal.SIGKILL)

    async def look(self) -> None:
        """Count the machines that run."""
        while True:
            self.most = max(self.most, len(await asyncio.to_thread(self.system.guests)))
            await asyncio.sleep(0.5)

    async def clean(self) -> None:
        """Wait until there are as many clean machines as there should be, and no others."""
        async with asyncio.timeout(SERVED_SECONDS):
            while [machine.state for machine in self.leases.living(POOL)] != [State.CLEAN] * self.size.clean:
                await asyncio.sleep(0.2)

    # What a station does

    async def visit(self, station: str, chance: random.Random) -> None:
        """Ask until there was a session; see what is in its machine, use it, and go in one way or another."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while True:
            client = Client({"plain": self.ports[1]}, _NO_TLS, station)
            try:
                async with asyncio.timeout(SERVED_SECONDS - (loop.time() - asked)):
                    link, lease = await self._sit_down(client, station, chance)
            except TimeoutError:
                raise AssertionError(f"{station} was not served within {SERVED_SECONDS:.0f} s") from None
            except (OSError, EOFError) as error:
                client.close()
                self.ends[f"no session: {type(error).__name__}"] += 1
                await asyncio.sleep(0.2)
                continue
            break
        self.waits.append(loop.time() - asked)
        self.inside.add(lease)
        try:
            seen = await asyncio.to_thread(self._look_inside, lease, f"{station} {lease}".encode())
            self.visits.append(Visit(station, lease, seen))
            await self._use(client, link, chance)
        finally:
            self.inside.discard(lease)
            client.close()

    async def _sit_down(self, client: Client, station: str, chance: random.Random) -> tuple[Link, str]:
        """Wait for a machine and link to it. Returns the main channel, and the UUID that the machine says."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[0], local_addr=(station, 0))
        try:
            while PHRASE.encode() not in (line := await _soon(reader.readline())):
                if not line:
                    raise EOFError
            if chance.random() < 0.1:
                self.ends["hung up"] += 1
                raise EOFError  # and asks again
            await asyncio.sleep(chance.uniform(0, 0.3))  # a viewer is being started
            link = await _soon(client.link())
            if link.error:
                self.ends[f"refused with {link.error}"] += 1
                raise EOFError
            while True:
                data = spice.parse_data_header(await _soon(link.reader.readexactly(6)), mini=True)
                body = await _soon(link.reader.readexactly(data.size))
                if data.kind == _MAIN_UUID:
                    return link, str(uuid.UUID(bytes=body[:16]))
        finally:
            writer.close()

    async def _use(self, client: Client, main: Link, chance: random.Random) -> None:
        """Open the other channels of a viewer, and leave."""
        how = chance.choice(
            ("at once", "properly", "properly", "with a reset", "main first", "frozen display")
        )
        channels: list[Link] = []
        with contextlib.suppress(OSError, EOFError):
            if how != "at once":
                for kind, first in ((DISPLAY, _DISPLAY_INIT), (spice.INPUTS_CHANNEL, _KEY_DOWN)):
                    channels.append(await client.link(connection=main.identifier, channel=kind))
                    if how != "frozen display":
                        channels[-1].writer.write(first)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0, 2)):
                    while await main.reader.read(65536):
                        pass
                    how = "it ended"
        self.ends[how] += 1
        if how == "with a reset":
            for link in (main, *channels):
                link.writer.get_extra_info("socket").setsockopt(1, 13, _LINGER)  # SOL_SOCKET, SO_LINGER
                link.writer.transport.abort()
        elif how == "main first":
            main.close()
            await asyncio.sleep(0.2)

    def _look_inside(self, lease: str, mark: bytes) -> bool:
        """Leave a mark on a machine's disk, where nothing may be. Returns whether it was there to be seen."""
        end = time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < end:
            try:
                with self.system.connection() as connection:
                    domain = desktop.domain(connection, lease)
                    if domain is None:
                        return False
                    inside = desktop.Inside(domain)
                    found = inside.read("/dev/vda", _MARKED).rstrip(b"\0")
                    assert found in (b"", mark), f"{mark!r} finds {found!r}"
                    inside.write("/dev/vda", mark.ljust(_MARKED, b"\0"), "r+")
                    return True
            except libvirt.libvirtError:
                # libvirt is being killed, or the machine: one will be there again, the other not.
                if self.leases.get(lease).state not in (State.OFFERED, State.IN_USE):
                    return False
                time.sleep(0.2)
        raise AssertionError(f"nobody can look into the machine of {lease}")

    # What happens meanwhile

    def happenings(self, chance: random.Random) -> dict[str, Callable[[], Awaitable[None]]]:
        """All that can happen, by its name."""

        async def stop_service() -> None:
            self._end_service(signal.SIGTERM)

        async def kill_relay() -> None:
            for pid in await asyncio.to_thread(self.relays):
                os.kill(pid, signal.SIGKILL)

        async def kill_machine() -> None:
            guests = await asyncio.to_thread(self.system.guests)
            if guests:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(guests), signal.SIGKILL)

        async def destroy_domain() -> None:
            await asyncio.to_thread(self._destroy_any, chance)

        async def kill_libvirtd() -> None:
            self.system.kill_daemon()
            await asyncio.sleep(chance.uniform(0, 2))
            self.system.start_daemon()

        async def fill_disk() -> None:
            with self._full():
                await asyncio.to_thread(self._write_much, chance)
                await asyncio.sleep(chance.uniform(1, 4))

        return {
            "the service is killed": self.kill_service,
            "the service is restarted": stop_service,
            "the relay is killed": kill_relay,
            "a machine is killed": kill_machine,
            "a domain is destroyed by hand": destroy_domain,
            "libvirtd is killed": kill_libvirtd,
            "the disk is full": fill_disk,
        }

    async def disturb(
        self, chance: random.Random, pauses: tuple[float, float], rounds: int, over: asyncio.Event
    ) -> None:
        """Let everything happen once in any order, so many times; no more than once when it is over."""
        happenings = self.happenings(chance)
        for number in range(rounds):
            for name in chance.sample(sorted(happenings), len(happenings)):
                if number and over.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), chance.uniform(*pauses))
                self.done[name] += 1
                self.say(name)
                await happenings[name]()

    def say(self, what: str) -> None:
        """Tell whoever watches, and the service's log, when it was."""
        line = f"{time.strftime('%H:%M:%S')} ---- {what} ({len(self.visits)} sessions)"
        print(line, flush=True)
        with self.log.open("a") as log:
            log.write(f"{line}\n")

    def _end_service(self, number: signal.Signals) -> None:
        assert self.served
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.served.pid, number)

    def relays(self) -> list[int]:
        """The pool's relays, by process id."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"vdibuild.pool.relay" in words and str(self.directory / "relay.json").encode() in words:
                    found.append(int(process.name))
        return found

    def _destroy_any(self, chance: random.Random) -> None:
        with contextlib.suppress(libvirt.libvirtError), self.system.connection() as connection:
            domains = sorted(connection.listAllDomains(), key=lambda domain: str(domain.UUIDString()))
            if domains:
                chance.choice(domains).destroy()

    @contextlib.contextmanager
    def _full(self) -> Iterator[None]:
        """Nothing more can be written where the pool is."""
        ballast = self.directory / "ballast"
        try:
            with ballast.open("wb") as file:
                for size in (1 << 20, 1 << 12):
                    with contextlib.suppress(OSError):
                        while True:
                            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            yield
        finally:
            ballast.unlink(missing_ok=True)

    def _write_much(self, chance: random.Random) -> None:
        """Somebody writes to their machine's disk, which finds no room."""
        with contextlib.suppress(libvirt.libvirtError), self.system.connection() as connection:
            for lease in sorted(self.inside)[:2]:
                domain = desktop.domain(connection, lease)
                if domain is not None:
                    many = [
                        "if=/dev/zero",
                        "of=/dev/vda",
                        "bs=64k",
                        "seek=16",
                        f"count={chance.randint(8, 64)}",
                    ]
                    desktop.Inside(domain).start("dd", *many)

    # The end

    async def stop(self) -> None:
        """End the service, as an administrator does."""
        self.stopping = True
        self._end_service(signal.SIGTERM)
        assert self.served
        await asyncio.to_thread(self.served.wait, 30)

    def check(self) -> None:
        """What holds after all of it."""
        said = self.log.read_text(errors="replace")
        assert "Traceback" not in said, said[said.index("Traceback") - 2000 :][:20_000]
        given = Counter(visit.lease for visit in self.visits)
        assert given.most_common(1)[0][1] == 1, "a machine was handed out twice"
        for visit in self.visits:
            machine = self.leases.get(visit.lease)
            assert (machine.station, machine.state) == (visit.station, State.GONE), machine
        assert self.most <= self.size.maximum, f"{self.most} machines ran"
        assert self.leases.living(POOL) == []
        assert list((self.directory / "machines").iterdir()) == []
        assert self.relays() == []
        assert self.system.leftovers() == []


async def run(made: Pool, sessions: int, seed: int, pauses: tuple[float, float], rounds: int = 1000) -> None:
    """Have so many sessions at a pool while everything happens to it, so many seconds apart; then end it, and
    clear it. rounds: how often everything happens at most, and once at least.

    Raises AssertionError when a station was not served, or got what it must not.
    """
    over = asyncio.Event()
    left = iter(range(sessions))

    async def station(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")  # noqa: S311 (no secret)
        for _ in left:
            await made.visit(f"127.0.1.{number + 1}", chance)
            await asyncio.sleep(chance.uniform(0, 0.5))

    await made.clean()
    chance = random.Random(seed)  # noqa: S311 (no secret)
    disturbing = asyncio.create_task(made.disturb(chance, pauses, rounds, over))
    try:
        async with asyncio.TaskGroup() as stations:
            for number in range(made.size.stations):
                stations.create_task(station(number))
    finally:
        over.set()
        await disturbing
    made.say("over")
    await made.clean()
    await made.stop()
    status, output = await asyncio.to_thread(made.site.run, "pool.clear")
    assert status == 0, output


@contextlib.asynccontextmanager
async def pool(
    site: SiteDirectory, directory: Path, size: Size, modules: Sequence[str] = desktop.MODULES
) -> AsyncIterator[Pool]:
    """A pool of tiny machines, on a disk and a libvirt of its own in an empty directory.

    modules: those of the kernel that its machines load.
    """
    libvirtd.let_in(directory)
    libvirtd.let_in(site.path)
    place = directory / "pools"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m,mode=0711", "pools", str(place)], check=True)
    try:
        (directory / "guest").mkdir()
        template = desktop.make(directory / "guest", modules)
        site.configure(_SITE)
        desktop.add(site.path, IMAGE, template)
        with libvirtd.system(directory) as system:
            with system.connection() as connection:
                connection.getCapabilities()
            ports = _free_ports()
            _configure(site, system, size, ports)
            (place / POOL).mkdir()
            leases = Leases(f"sqlite:///{place / POOL / 'leases.db'}")
            made = Pool(site, system, size, ports, leases, directory / "serve.log")
            tasks = [asyncio.create_task(made.serve()), asyncio.create_task(made.look())]
            try:
                yield made
            finally:
                made.stopping = True
                made._end_service(signal.SIGKILL)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                leases.close()
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


async def _soon(answer: Awaitable[_Answer]) -> _Answer:
    """What the other side says, unless it is silent for too long: then its end. Raises EOFError."""
    try:
        return await asyncio.wait_for(answer, _SILENCE_SECONDS)
    except TimeoutError:
        raise EOFError("silence") from None


def _configure(site: SiteDirectory, system: Libvirt, size: Size, ports: tuple[int, int]) -> None:
    described = {
        "image": IMAGE,
        "clean": size.clean,
        "maximum": size.maximum,
        "memory": "192MiB",
        "cores": 1,
        "disk": f"{MACHINE_DISK}MiB",
        "boot_seconds": 60,
        "offer_seconds": 5,
        "listen": "127.0.0.1",
        "directory": str(system.directory / "pools"),
        "signal_port": ports[0],
        "spice_port": ports[1],
        "reserve_memory": "256MiB",
        "reserve_disk": f"{MACHINE_DISK}MiB",
    }
    with (site.path / "vdibuild.yaml").open("a") as file:
        file.write(f"libvirt: {system.uri}\npools: {json.dumps({POOL: described})}\n")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
