"""How long a station waits at the signal port where a machine is clean, alone and with many others.

The signal port, the service with its broker and leases, and the way to the relay are the real ones, in a
process of their own, with a SQLite database on this disk; at the way's end somebody only reads, and nobody
makes machines. A station is one connection, from an address of its own; its time runs from before it connects
until it has read CONNECT NOW. All stations are in one process: what that takes is in their times, and is
measured beside it, with a server that only answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import selectors
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.bench.report import Rows, met
from tests.pool import IMAGE, POOL, VERSION
from vdibuild.pool import control
from vdibuild.pool.broker import Limits
from vdibuild.pool.clones import Endpoint, Found
from vdibuild.pool.leases import Leases, Machine
from vdibuild.pool.pauses import freeze
from vdibuild.pool.relay_link import RelayLink
from vdibuild.pool.service import Service, Wishes
from vdibuild.pool.signal_port import PHRASE, SignalPort

ROUNDS = {1: 200, 100: 30, 1000: 5}
"""How often so many stations ask at once."""

_SECONDS = 60
_MOST = 1000
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a closed connection leaves nothing behind


class NoCloner:
    """Makes no machines, and says that those which the database has are there; see clones.Cloner."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def promoted(self) -> str:
        return VERSION

    async def keep(self, versions: Set[str]) -> None:
        pass

    async def room(self) -> int:
        return 0

    async def make(self, machine: Machine) -> Endpoint:
        raise NotImplementedError

    async def finish(self, machine: Machine) -> Endpoint:
        raise NotImplementedError

    async def destroy(self, lease: str) -> None:
        pass

    async def found(self) -> dict[str, Found]:
        return {one.lease: Found(Endpoint(Path("/nowhere"), "secret")) for one in self._leases.living(POOL)}

    async def tell(self, lease: str, text: str) -> None:
        pass


def serve(directory: Path, commands: Connection) -> None:
    """The pool's side: prepares clean machines, as many as it is told, and ends those of the round before."""
    allow_files()
    asyncio.run(_serving(directory, commands))


async def _serving(directory: Path, commands: Connection) -> None:
    leases = Leases(f"sqlite:///{directory / 'leases.db'}")
    relay = await asyncio.start_unix_server(_listen, directory / "control")
    while (number := await asyncio.to_thread(commands.recv)) is not None:
        for _ in range(number):
            machine = leases.start(POOL, IMAGE, VERSION, _MOST)
            assert machine
            leases.clean(machine.lease)
        link = RelayLink(directory / "control")
        wishes = Wishes(IMAGE, lambda _: _MOST, _MOST)
        limits = Limits(offer_seconds=_SECONDS)
        service = Service(POOL, wishes, leases, NoCloner(leases), link, limits)
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        async with service.running(), link.running(service), SignalPort(service.broker).serving(listening):
            while not link.connected:
                await asyncio.sleep(0.01)
            freeze()
            commands.send(listening.getsockname()[1])
            await asyncio.to_thread(commands.recv)
        for machine in leases.living(POOL):
            leases.end(machine.lease, "the round is over")
            leases.gone(machine.lease)
    relay.close()
    leases.close()


async def _listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The relay's end of the way: it has nothing, and says so when asked."""
    while line := await reader.readline():
        if isinstance(control.command(line), control.GetState):
            writer.write(control.State(sessions=[], offers=[]).line())
    writer.close()


def answer(_directory: Path, commands: Connection) -> None:
    """A server that tells everybody to connect at once: what the stations take by themselves."""

    async def tell(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{PHRASE}\n".encode())

    async def run() -> None:
        server = await asyncio.start_server(tell, "127.0.0.1", 0, backlog=1024)
        while await asyncio.to_thread(commands.recv) is not None:
            commands.send(server.sockets[0].getsockname()[1])
            await asyncio.to_thread(commands.recv)

    allow_files()
    asyncio.run(run())


def together(port: int, addresses: list[str]) -> list[float]:
    """Seconds until each of these stations was told to connect."""
    times: list[float] = []
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for address in addresses:
            station = stack.enter_context(socket.socket())
            station.setblocking(False)
            station.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            station.bind((address, 0))
            began = time.perf_counter()
            with contextlib.suppress(BlockingIOError):
                station.connect(("127.0.0.1", port))
            selector.register(station, selectors.EVENT_READ, began)
        while len(times) < len(addresses):
            for key, _ in selector.select(_SECONDS):
                heard = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if PHRASE.encode() in heard:
                    times.append(time.perf_counter() - key.data)
                    selector.unregister(key.fileobj)
                elif not heard:
                    raise SystemExit("a station was sent away")
    return times


def allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def measure() -> Rows:
    """Measure the pool, and the server that only answers."""
    allow_files()
    stations = (f"127.{a}.{b}.{c}" for a in range(1, 250) for b in range(250) for c in range(1, 250))
    rows: list[tuple[str, ...]] = []
    for name, server in (("the pool", serve), ("a server that only answers", answer)):
        with tempfile.TemporaryDirectory() as directory:
            for number, times in _times(Path(directory), server, stations):
                cuts = statistics.quantiles(times, n=100, method="inclusive")
                middle, late, last = (1000 * value for value in (cuts[49], cuts[98], max(times)))
                goal = server is serve and number == 100
                rows.append(
                    (
                        f"{name}, {number} at once",
                        *(f"{value:.1f} ms" for value in (middle, late, last)),
                        "p99 under 50 ms" if goal else "",
                        met(late < 50) if goal else "",
                    )
                )
    columns = ("stations", "p50", "p99", "the last", "wanted", "reached")
    return Rows("From the signal to CONNECT NOW, with a clean machine for each", columns, tuple(rows))


def _times(
    directory: Path, server: Callable[[Path, Connection], None], stations: Iterator[str]
) -> Iterator[tuple[int, list[float]]]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=server, args=(directory, theirs), daemon=True)
    process.start()
    for number, rounds in ROUNDS.items():
        times: list[float] = []
        for _ in range(rounds):
            ours.send(number)
            times += together(ours.recv(), [next(stations) for _ in range(number)])
            ours.send(number)
        yield number, times
    ours.send(None)
    process.join()


if __name__ == "__main__":
    print(measure().markdown())
