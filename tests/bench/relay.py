"""How fast the relay is beside a direct connection, at 1 and at 32 channels at once.

    python -m tests.bench.relay [SECONDS]

A machine (a process of its own) sends as fast as it can; a viewer (another one) reads. Directly, the viewer
connects to the machine's TCP port; through the relay (a third process), to the relay's port, and that to the
machine's unix socket. On a bare loopback three processes then share what processors there are, where a
direct connection has two: with fewer than three free ones, the ratio says more about the host. So it is
measured also with a viewer that reads no faster than a network lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests import spice as fakes
from tests.spice import DISPLAY, Broker, Client
from vdibuild.pool.control import Offer

ROUNDS = 3
BLOCK = 1 << 18
LEASE = "bench"


def machine(path: Path, ready: Connection) -> None:
    """A machine whose display channels send for ever; its TCP port sends at once, without a link."""

    async def serve() -> None:
        fake = fakes.FakeMachine(path, f"{LEASE}-real")

        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await (pump(reader, writer) if fake.links[-1].channel == DISPLAY else reader.read())

        fake.behave = behave
        await fake.start()
        direct = await asyncio.start_server(pump, "127.0.0.1", 0)
        ready.send(direct.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


async def pump(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send for ever, from a socket, without asyncio's copies."""
    connection = writer.transport.get_extra_info("socket")
    copy = socket.socket(fileno=os.dup(connection.fileno()))
    copy.setblocking(False)
    loop = asyncio.get_running_loop()
    block = memoryview(bytes(BLOCK))
    with contextlib.suppress(OSError), copy:
        while True:
            await loop.sock_sendall(copy, block)


def read(connections: list[socket.socket], seconds: float, most: float | None) -> float:
    """Read from all of them for so long; returns bytes per second. most: how many it may be."""
    buffer = memoryview(bytearray(BLOCK))
    total = 0
    with selectors.DefaultSelector() as selector:
        for one in connections:
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ)
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            for key, _ in selector.select(1):
                total += key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
            if most and (early := total / most - (time.monotonic() - began)) > 0:
                time.sleep(early)
    return total / (now - began)


async def linked(ports: dict[str, int], number: int, certificates: fakes.Certificates) -> list[socket.socket]:
    """So many display channels of one session, as plain sockets."""
    client = Client(ports, certificates.trusting())
    main = await client.link()
    sockets = [duplicate(main.writer)]
    for _ in range(number):
        link = await client.link(main.identifier, DISPLAY)
        link.reader._transport.pause_reading()  # type: ignore[attr-defined]
        sockets.append(duplicate(link.writer))
    return sockets


def duplicate(writer: asyncio.StreamWriter) -> socket.socket:
    return socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))


def through_relay(
    config: Path,
    ports: dict[str, int],
    made: fakes.Certificates,
    number: int,
    seconds: float,
    most: float | None,
) -> float:
    async def open_all() -> list[socket.socket]:
        broker = await Broker.connect(config / "control")
        broker.tell(
            Offer.model_validate(
                {
                    "lease": f"{LEASE}-{time.monotonic_ns()}",
                    "socket": config / LEASE,
                    "password": f"{LEASE}-real",
                    "station": "127.0.0.1",
                    "expires": 30,
                }
            )
        )
        await broker.state()
        sockets = await linked(ports, number, made)
        broker.close()
        return sockets

    main, *displays = asyncio.run(open_all())
    rate = read(displays, seconds, most)
    for one in (main, *displays):
        one.close()
    time.sleep(0.3)
    return rate


def directly(port: int, number: int, seconds: float, most: float | None) -> float:
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
    rate = read(connections, seconds, most)
    for one in connections:
        one.close()
    time.sleep(0.3)
    return rate


async def answered(control: Path) -> None:
    (await fakes.connected(control)).close()


@contextlib.contextmanager
def running(directory: Path, made: fakes.Certificates) -> Iterator[dict[str, int]]:
    """The relay as a process of its own; gives its ports."""
    config, ports = fakes.with_free_ports(fakes.configuration(directory, made))
    relay = fakes.RelayProcess(config, directory)
    relay.start()
    try:
        asyncio.run(answered(config.control))
        yield ports
    finally:
        relay.stop()


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        made = fakes.certificates(directory)
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        source = context.Process(target=machine, args=(directory / LEASE, theirs), daemon=True)
        source.start()
        port = ours.recv()
        with running(directory, made) as ports:
            for gigabits, number in itertools.product((None, 10, 1), (1, 32)):
                most = gigabits * 1e9 / 8 if gigabits else None
                pairs = [
                    (
                        directly(port, number, seconds, most),
                        through_relay(directory, ports, made, number, seconds, most),
                    )
                    for _ in range(ROUNDS)
                ]
                direct, relayed = (statistics.median(column) for column in zip(*pairs, strict=True))
                network = f"{gigabits} Gbit/s" if gigabits else "loopback"
                figures = f"direct {direct / 1e9:.3f} GB/s, relay {relayed / 1e9:.3f} GB/s"
                print(f"{network:9} {number:2} channels: {figures}, ratio {relayed / direct:.2f}", flush=True)
            print(f"medians of {ROUNDS} rounds of {seconds:g} s; {os.cpu_count()} processors", end=", ")
            print(f"load {os.getloadavg()[0]:.1f}, with the benchmark's own")
        source.terminate()
        source.join()


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 3)
