"""How long a station waits at the signal port where a machine is clean, alone and with many others.

    python -m tests.bench.pool

The signal port, the broker and the leases are the real ones, in a process of their own, with a SQLite
database on this disk; machines and relay only take notes. A station is one connection, from an address of
its own; its time runs from before it connects until it has read CONNECT NOW. All stations are in this
process: what it needs for them is in their times, and is measured beside it, with a server that only answers.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.pool import POOL, Desk, desk
from vdibuild.pool.broker import Limits
from vdibuild.pool.signal_port import PHRASE, SignalPort

ROUNDS = {1: 200, 100: 20, 1000: 5}
"""How often so many stations ask at once."""

SECONDS = 60


def serve(directory: Path, commands: Connection) -> None:
    """The pool's side: prepares clean machines, as many as it is told, and ends those of the round before."""
    allow_files()
    asyncio.run(serving(directory, commands))


async def serving(directory: Path, commands: Connection) -> None:
    there = desk(directory, Limits(offer_seconds=SECONDS))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        async with SignalPort(there.broker).serving(listening):
            commands.send(listening.getsockname()[1])
            while (number := await asyncio.to_thread(commands.recv)) is not None:
                prepare(there, number)
                commands.send(number)
    there.leases.close()


def prepare(there: Desk, number: int) -> None:
    for machine in there.leases.living(POOL):
        there.broker.end(machine.lease, "the round is over")
        there.leases.gone(machine.lease)
    for _ in range(number):
        there.clean()


async def ask(port: int, address: str) -> float:
    """Seconds until a station is told to connect."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    while PHRASE.encode() not in (line := await reader.readline()):
        if not line:
            raise ConnectionError(f"{address} was sent away")
    seconds = time.perf_counter() - began
    writer.transport.abort()
    return seconds


async def together(port: int, addresses: list[str]) -> list[float]:
    async with asyncio.timeout(SECONDS):
        return await asyncio.gather(*(ask(port, address) for address in addresses))


def allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def answer(_directory: Path, commands: Connection) -> None:
    """A server that tells everybody to connect at once: what the stations take by themselves."""

    async def tell(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{PHRASE}\n".encode())

    async def run() -> None:
        server = await asyncio.start_server(tell, "127.0.0.1", 0, backlog=1024)
        commands.send(server.sockets[0].getsockname()[1])
        while (number := await asyncio.to_thread(commands.recv)) is not None:
            commands.send(number)

    allow_files()
    asyncio.run(run())


def main() -> None:
    allow_files()
    stations = (f"127.{a}.{b}.{c}" for a in range(1, 250) for b in range(250) for c in range(1, 250))
    for name, server in (("a server that only answers", answer), ("the pool", serve)):
        print(name)
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), server, stations)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, with the benchmark's own")


def measure(directory: Path, server: Callable[[Path, Connection], None], stations: Iterator[str]) -> None:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=server, args=(directory, theirs), daemon=True)
    process.start()
    port = ours.recv()
    for number, rounds in ROUNDS.items():
        times: list[float] = []
        for _ in range(rounds):
            ours.send(number)
            ours.recv()
            times += asyncio.run(together(port, [next(stations) for _ in range(number)]))
        report(number, rounds, times)
    ours.send(None)
    process.join()


def report(number: int, rounds: int, times: list[float]) -> None:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    middle, late, last = (1000 * value for value in (cuts[49], cuts[98], max(times)))
    said = f"p50 {middle:.1f} ms, p99 {late:.1f} ms, the last {last:.1f} ms"
    print(f"  {number:4} at once, {rounds:3} rounds: {said}", flush=True)


if __name__ == "__main__":
    main()
