"""The pool beside the seed's shell scripts, driven by the same stations, and what either gets wrong.

The signal port, SPICE port and machines are in one network namespace, the stations in another. A machine is
a stand-in for QEMU on either side: it takes as long to start, answers SPICE links, lets the first client go
when a second one links (as QEMU does), and notes who came. All else is the real thing: for the scripts
(seed_pool/) iptables, netstat and a stand-in for xinetd; for the pool its service, leases, broker, signal
port and relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.bench.report import Rows
from tests.network import Namespace
from tests.pool import IMAGE, POOL, VERSION
from tests.spice import DISPLAY, Client, FakeMachine, RelayProcess, connected
from vdibuild.pool import spice
from vdibuild.pool.broker import Limits
from vdibuild.pool.clones import Endpoint, Found
from vdibuild.pool.leases import Leases, Machine
from vdibuild.pool.relay import Config, Listener
from vdibuild.pool.relay_link import RelayLink
from vdibuild.pool.service import Service, Wishes
from vdibuild.pool.signal_port import PHRASE, SignalPort

MACHINES = 4
"""As the seed's configuration has it."""

BOOT_SECONDS = 2.0
SESSION_SECONDS = 3.0
SECONDS = 30.0
"""How long stations try to be served after the last one came."""

_SERVER = "10.9.0.1"
_SIGNAL_PORT, _SPICE_PORT, _FIRST_PORT = 5905, 5906, 5920
_SILENCE_SECONDS = 1.0  # as `nc -i 1`
_SETTLE_SECONDS = 5.0
_RETRY_SECONDS = 0.05  # a shell's loop takes as long to start the next command
_RETURN_SECONDS = 1.0  # after a viewer's end the station's user is logged in again
_START_SECONDS = 0.3  # until `virsh start` returns
_INSTANCES, _PER_SOURCE = 50, 10  # what xinetd's own configuration allows on Fedora and CentOS
_SCRIPTS = Path(__file__).parent / "seed_pool"
_VIRSH = '#!/bin/sh\necho "$@" | exec ncat -U "$VIRSH"\n'
_BASE = "win10"
_DOMAIN = f"<domain><name>{_BASE}</name><mac address='52:54:00:00:00:01'/></domain>\n"


@dataclass(frozen=True)
class Rush:
    """How stations come. every: seconds from one to the next, 0 for all at once."""

    name: str
    stations: int
    every: float


RUSHES = (Rush("20 at once", 20, 0.0), Rush("6, one every 5 s", 6, 5.0))


@dataclass
class Tally:
    """What was seen. served: stations that had a whole session; others are lost. asked: connections to the
    signal port. broken: sessions that ended before their station left. shared: machines that more than one
    station came to. early: stations that were let in to a machine that had not started. refused: links that
    failed after CONNECT NOW. left: used machines that still run when all have gone. stuck: machines that
    the pool counts, and that do not run. seconds: until the last was served.
    """

    side: str
    rush: Rush
    served: int = 0
    asked: int = 0
    broken: int = 0
    refused: int = 0
    shared: int = 0
    early: int = 0
    left: int = 0
    stuck: int = 0
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Stations that never had a whole session."""
        return self.rush.stations - self.served


class StandIn(FakeMachine):
    """A machine of either side. people: who came, in order. early: how many of them before it had started."""

    def __init__(self, path: Path, password: str) -> None:
        super().__init__(path, password)
        self.began = time.monotonic()
        self.people: list[str] = []
        self.early = 0
        self.behave = self._receive
        self._there: list[asyncio.StreamWriter] = []
        self._listening: asyncio.Server | None = None

    async def listen(self, port: int) -> None:
        """Show the screen on a TCP port."""
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def stop(self) -> None:
        if self._listening:
            self._listening.close()
            for writer in self.writers:
                if not writer.is_closing():
                    writer.transport.abort()
        else:
            await super().stop()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.links[-1].channel == spice.MAIN_CHANNEL:
            for other in self._there:
                if not other.is_closing():
                    other.transport.abort()  # a second client takes the first one's place
            self._there = []
        self._there.append(writer)
        while line := await reader.readline():
            if (person := line.decode().strip()) not in self.people:
                self.people.append(person)
                self.early += time.monotonic() < self.began + BOOT_SECONDS
            writer.write(line)


async def person(number: int, tally: Tally, end: float) -> None:
    """Do what the old client does until it has had a whole session."""
    address = f"10.9.1.{number + 1}"
    await asyncio.sleep(number * tally.rush.every)
    while time.monotonic() < end:
        tally.asked += 1
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            reader, writer = await asyncio.open_connection(_SERVER, _SIGNAL_PORT, local_addr=(address, 0))
            try:
                if await _called(reader):
                    if await _session(address, tally):
                        tally.served += 1
                        return
                    await asyncio.sleep(_RETURN_SECONDS)
            finally:
                writer.transport.abort()
        await asyncio.sleep(_RETRY_SECONDS)


async def _called(reader: asyncio.StreamReader) -> bool:
    while line := await asyncio.wait_for(reader.readline(), _SILENCE_SECONDS):
        if PHRASE.encode() in line:
            return True
    return False


async def _session(address: str, tally: Tally) -> bool:
    """Whether it lasted as long as the station wanted."""
    client = Client({"plain": _SPICE_PORT}, ssl.create_default_context(), address, host=_SERVER)
    try:
        async with asyncio.timeout(_SILENCE_SECONDS * 5):
            main = await client.link()
            if main.error:
                raise ConnectionRefusedError
            display = await client.link(main.identifier, DISPLAY)
            if display.error:
                raise ConnectionRefusedError
            await display.echo(f"{address}\n".encode())
    except (OSError, EOFError, TimeoutError):
        tally.refused += 1
        client.close()
        return False
    try:
        async with asyncio.timeout(SESSION_SECONDS):
            await main.ended()
    except TimeoutError:
        return True
    finally:
        client.close()
    tally.broken += 1
    return False


# The seed's side


class Seed:
    """What the scripts find: a hypervisor, and who runs them for each station. fixed: every MAC is valid."""

    def __init__(self, directory: Path, fixed: bool) -> None:
        self.directory = directory
        self.fixed = fixed
        self.defined: set[str] = set()
        self.running: dict[str, StandIn] = {}
        self.ended: list[StandIn] = []
        self.scripts: dict[subprocess.Popen[bytes], str] = {}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        lists = self.directory / "lists"
        lists.mkdir()
        for name in ("clear", "waste", "recycle", "conn_wait"):
            (lists / f"{name}.list").touch()
        commands = self.directory / "bin"
        commands.mkdir()
        (commands / "virsh").write_text(_VIRSH)
        (commands / "virsh").chmod(0o755)
        socket_path = self.directory / "virsh"
        environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "VIRSH": str(socket_path),
            "SCRIPTS": str(_SCRIPTS),
            "LISTS": str(lists),
            "BASE": _BASE,
            "POOL_SIZE": str(MACHINES),
            "START_PORT": str(_FIRST_PORT),
            "SPICE_PORT": str(_SPICE_PORT),
            "INTERFACE": "stations",
            "FIXED_MAC": "1" if self.fixed else "",
        }
        for setting in ("all", "stations"):
            Path(f"/proc/sys/net/ipv4/conf/{setting}/route_localnet").write_text("1")
        hypervisor = await asyncio.start_unix_server(self._virsh, socket_path)
        with socket.create_server((_SERVER, _SIGNAL_PORT), backlog=1024) as listening:
            listening.setblocking(False)
            accepting = asyncio.create_task(self._accept(listening, environment))
            # Its machines are there before the first station comes, as they are for the pool.
            first = await asyncio.create_subprocess_exec(
                _SCRIPTS / "vm_manager.sh",
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(first.wait(), 4 * BOOT_SECONDS)
            await asyncio.sleep(BOOT_SECONDS)
            try:
                yield
            finally:
                accepting.cancel()
                hypervisor.close()
                for group in (first.pid, *(one.pid for one in self.scripts)):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGKILL)
                for one in self.scripts:
                    one.wait()
                for machine in self.running.values():
                    await machine.stop()

    def count(self, tally: Tally) -> None:
        """What is wrong with the machines, now that everybody has gone."""
        machines = [*self.ended, *self.running.values()]
        tally.shared = sum(len(machine.people) > 1 for machine in machines)
        tally.early = sum(machine.early for machine in machines)
        tally.left = sum(bool(machine.people) for machine in self.running.values())
        listed = set()
        for file in (self.directory / "lists").glob("*.list"):
            listed |= {f"{_BASE}-{line.strip()}" for line in file.read_text().splitlines() if line.strip()}
        tally.stuck = len(listed - self.running.keys())

    async def _accept(self, listening: socket.socket, environment: dict[str, str]) -> None:
        """What xinetd does with `wait = no`."""
        loop = asyncio.get_running_loop()
        while True:
            connection, (address, _) = await loop.sock_accept(listening)
            with connection:
                running = [source for script, source in self.scripts.items() if script.poll() is None]
                if len(running) >= _INSTANCES or running.count(address) >= _PER_SOURCE:
                    continue
                connection.setblocking(True)
                script = subprocess.Popen(
                    [_SCRIPTS / "vm_manager.sh"],
                    env=environment,
                    stdin=connection.fileno(),
                    stdout=connection.fileno(),
                    stderr=connection.fileno(),
                    start_new_session=True,
                )
                self.scripts[script] = address

    async def _virsh(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command, *arguments = (await reader.readline()).decode().split()
        with contextlib.suppress(OSError):
            writer.write((await self._answer(command, arguments)).encode())
            writer.close()

    async def _answer(self, command: str, arguments: list[str]) -> str:
        match command, arguments:
            case "dumpxml", _:
                return _DOMAIN
            case "define", [path]:
                text = Path(path).read_text()
                found = re.search(r"<name>(.*?)</name>.*<mac address='(.*?)'", text)
                if found is None:
                    return "error: (domain_definition):1: Document is empty\n"  # another script writes it
                if int(found[2].split(":")[0], 16) & 1:
                    return f"error: expected unicast mac address, found multicast '{found[2]}'\n"
                self.defined.add(found[1])
            case "start", [name] if name in self.defined and name not in self.running:
                machine = StandIn(self.directory / name, "")
                await machine.listen(int(name.rpartition("-")[2]))
                self.running[name] = machine
                await asyncio.sleep(_START_SECONDS)
            case "list", _:
                return "".join(f" 1 {name} running\n" for name in self.running)
            case "destroy", [name] if name in self.running:
                machine = self.running.pop(name)
                self.ended.append(machine)
                await machine.stop()
            case "undefine", [name]:
                self.defined.discard(name)
        return ""


# Ours


class StandInCloner:
    """Makes stand-ins as a pool's machines; see clones.Cloner."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.running: dict[str, StandIn] = {}
        self.ended: list[StandIn] = []

    async def promoted(self) -> str:
        return VERSION

    async def keep(self, versions: Set[str]) -> None:
        pass

    async def room(self) -> int:
        return MACHINES

    async def make(self, machine: Machine) -> Endpoint:
        made = StandIn(self._directory / machine.lease, machine.lease)
        await made.start()
        self.running[machine.lease] = made
        return await self.finish(machine)

    async def finish(self, machine: Machine) -> Endpoint:
        made = self.running[machine.lease]
        await asyncio.sleep(BOOT_SECONDS)
        return Endpoint(made.path, made.password)

    async def destroy(self, lease: str) -> None:
        machine = self.running.pop(lease, None)
        if machine:
            self.ended.append(machine)
            await machine.stop()
            machine.path.unlink(missing_ok=True)

    async def found(self) -> dict[str, Found]:
        return {lease: Found(Endpoint(one.path, one.password)) for lease, one in self.running.items()}

    async def tell(self, lease: str, text: str) -> None:
        pass


class Ours:
    """The pool, over stand-ins."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cloner = StandInCloner(directory)
        self._leases = Leases(f"sqlite:///{directory / 'leases.db'}")

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        config = Config(
            control=self._directory / "control",
            plain=Listener.model_validate({"address": _SERVER, "port": _SPICE_PORT}),
        )
        carrier = RelayProcess(config, self._directory)
        carrier.start()
        try:
            (await connected(config.control)).close()
            link = RelayLink(config.control)
            wishes = Wishes(IMAGE, lambda _: MACHINES, MACHINES)
            service = Service(POOL, wishes, self._leases, self._cloner, link, Limits())
            async with contextlib.AsyncExitStack() as stack:
                address = (_SERVER, _SIGNAL_PORT)
                listening = stack.enter_context(socket.create_server(address, backlog=1024))
                await stack.enter_async_context(service.running())
                await stack.enter_async_context(link.running(service))
                await stack.enter_async_context(SignalPort(service.broker).serving(listening))
                await asyncio.sleep((MACHINES + 1) * BOOT_SECONDS)  # the first starts are one at a time
                yield
        finally:
            carrier.stop()
            self._leases.close()

    def count(self, tally: Tally) -> None:
        machines = [*self._cloner.ended, *self._cloner.running.values()]
        tally.shared = sum(len(machine.people) > 1 for machine in machines)
        tally.early = sum(machine.early for machine in machines)
        tally.left = sum(bool(machine.people) for machine in self._cloner.running.values())
        tally.stuck = len({one.lease for one in self._leases.living(POOL)} - self._cloner.running.keys())


SIDES: dict[str, Callable[[Path], Seed | Ours]] = {
    "the pool": Ours,
    "the scripts": lambda directory: Seed(directory, fixed=False),
    "the scripts, every MAC valid": lambda directory: Seed(directory, fixed=True),
}


def side(name: str, rush: Rush, directory: Path, commands: Connection) -> None:
    """Serve until told to count; the other end gets a tally."""

    async def run() -> None:
        there = SIDES[name](directory)
        async with there.serving():
            commands.send(None)
            await asyncio.to_thread(commands.recv)
            tally = Tally(name, rush)
            there.count(tally)
            commands.send(tally)

    asyncio.run(run())


@contextlib.contextmanager
def networks() -> Iterator[tuple[Namespace, Namespace]]:
    """The server's and the stations', with a cable between them."""
    with contextlib.ExitStack() as stack:
        server, stations = (stack.enter_context(contextlib.closing(Namespace())) for _ in range(2))
        path = f"/proc/{os.getpid()}/fd/{stations.descriptor}"
        server.ip(f"link add stations type veth peer name eth0 netns {path}")
        server.ip(f"address add {_SERVER}/16 dev stations")
        server.ip("link set stations up")
        for number in range(max(rush.stations for rush in RUSHES)):
            stations.ip(f"address add 10.9.1.{number + 1}/16 dev eth0")
        stations.ip("link set eth0 up")
        yield server, stations


async def come(tally: Tally) -> None:
    """All stations."""
    began = time.monotonic()
    end = began + tally.rush.every * (tally.rush.stations - 1) + SECONDS
    await asyncio.gather(*(person(number, tally, end) for number in range(tally.rush.stations)))
    tally.seconds = time.monotonic() - began


def compare(name: str, rush: Rush) -> Tally:
    """What one side did for all stations."""
    context = get_context("spawn")
    tally = Tally(name, rush)
    with tempfile.TemporaryDirectory() as directory, networks() as (server, stations):
        ours, theirs = context.Pipe()
        serving = context.Process(target=side, args=(name, rush, Path(directory), theirs), daemon=True)
        with server.entered():
            serving.start()
        ours.recv()
        with stations.entered():
            asyncio.run(come(tally))
        time.sleep(_SETTLE_SECONDS)
        ours.send(None)
        seen = ours.recv()
        serving.join()
    for what in ("shared", "early", "left", "stuck"):
        setattr(tally, what, getattr(seen, what))
    return tally


def measure() -> list[Rows]:
    """Measure every side, with every rush. Needs root."""
    return [_table(rush, [compare(name, rush) for name in SIDES]) for rush in RUSHES]


def _table(rush: Rush, tallies: list[Tally]) -> Rows:
    counted: tuple[tuple[str, Callable[[Tally], object]], ...] = (
        ("stations that had a whole session", lambda one: f"{one.served} of {rush.stations}"),
        ("seconds until the last had it, or gave up", lambda one: f"{one.seconds:.0f}"),
        ("connections to the signal port", lambda one: one.asked),
        ("links that failed after CONNECT NOW", lambda one: one.refused),
        ("sessions that ended before their station left", lambda one: one.broken),
        ("machines that more than one station came to", lambda one: one.shared),
        ("stations that came to a machine before it had started", lambda one: one.early),
        ("used machines that still run when all have gone", lambda one: one.left),
        ("machines that are counted and do not run", lambda one: one.stuck),
    )
    rows = tuple((name, *(str(value(one)) for one in tallies)) for name, value in counted)
    return Rows(f"Stations: {rush.name}", ("seen", *(one.side for one in tallies)), rows)


if __name__ == "__main__":
    for table in measure():
        print(table.markdown(), flush=True)
