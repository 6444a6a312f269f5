"""What the relay costs beside a direct connection: throughput, streams of pictures, and single messages.

A machine (a process of its own) sends; a viewer (this one) reads. Directly, the viewer connects to the
machine's TCP port; through the relay (a third process) to the relay's port, and that to the machine's unix
socket. So a byte on its way is copied by the kernel twice directly, and four times through any relay in user
space: the bare loop of recv and send, in a fourth process, shows what of the difference is not this relay's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import selectors
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests import spice as fakes
from tests.bench.report import Rows, met
from tests.spice import DISPLAY, Broker, Client, RelayProcess
from vdibuild.pool import spice
from vdibuild.pool.control import Offer

ROUNDS = 5
SECONDS = 2.0
"""How long one measurement takes."""

BLOCK = 1 << 18
PICTURES_PER_SECOND = 25
_NETWORKS = (10, 1)  # Gbit/s
_HEADER = struct.Struct("<dI")  # when it was sent, by the monotonic clock; how many bytes follow
_LEASE = "bench"
_PAUSE_SECONDS = 0.3
_BLANK = memoryview(bytes(1 << 22))


# The machine


def machine(path: Path, ready: Connection) -> None:
    """A machine that does on each channel what its first line says, on a TCP port without a link too."""

    async def serve() -> None:
        fake = fakes.FakeMachine(path, f"{_LEASE}-real")
        fake.behave = _obey
        await fake.start()
        direct = await asyncio.start_server(_obey, "127.0.0.1", 0)
        ready.send(direct.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


async def _obey(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, EOFError):
        match (await reader.readline()).decode().split():
            case ["flood"]:
                await _flood(writer)
            case ["pictures", size, delay]:
                await _pictures(writer, int(size), float(delay))
            case ["answer"]:
                while data := await reader.read(BLOCK):
                    writer.write(data)
    writer.close()


@contextlib.contextmanager
def _socket(writer: asyncio.StreamWriter) -> Iterator[socket.socket]:
    """The socket itself: asyncio's own transports copy what they send."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as copy:
        copy.setblocking(False)
        yield copy


async def _flood(writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    with _socket(writer) as sink:
        while True:
            await loop.sock_sendall(sink, _BLANK[:BLOCK])


async def _pictures(writer: asyncio.StreamWriter, size: int, delay: float) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time() + delay
    with _socket(writer) as sink:
        while True:
            await asyncio.sleep(max(0, due - loop.time()))
            due += 1 / PICTURES_PER_SECOND
            await loop.sock_sendall(sink, _HEADER.pack(time.monotonic(), size))
            await loop.sock_sendall(sink, _BLANK[:size])


def forwarder(path: Path, ready: Connection) -> None:
    """A bare loop of recv and send from the machine's socket to one viewer after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ready.send(listening.getsockname()[1])
        buffer = memoryview(bytearray(BLOCK))
        while True:
            viewer, _ = listening.accept()
            source = asyncio.run(_linked_to(path))
            with viewer, source, contextlib.suppress(OSError):
                while size := source.recv_into(buffer):
                    viewer.sendall(buffer[:size])


async def _linked_to(path: Path) -> socket.socket:
    """A channel of the machine that floods."""
    reader, writer = await asyncio.open_unix_connection(path)
    link = spice.LinkMessage(fakes.SAME_IDENTIFIER, DISPLAY, 0, fakes.USUAL)
    writer.write(spice.build_link(link))
    size = spice.parse_header(await reader.readexactly(16))
    reply = spice.parse_reply(await reader.readexactly(size))
    writer.write(spice.word(1) + spice.encrypt_ticket(f"{_LEASE}-real", reply.key))
    writer.write(b"flood\n")
    await reader.readexactly(4)
    copy = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
    copy.setblocking(True)
    return copy


# The viewer


@dataclass(frozen=True)
class Ways:
    """How a viewer reaches the machine: connections, so many, each with its first line sent.

    direct: to the machine. bare: through a bare loop. relay: through the relay, whose process is `process`.
    """

    direct: Callable[[list[str]], list[socket.socket]]
    bare: Callable[[list[str]], list[socket.socket]]
    relay: Callable[[list[str]], list[socket.socket]]
    process: RelayProcess

    def relay_seconds(self) -> float:
        """Processor time that the relay has used (proc_pid_stat(5))."""
        text = Path(f"/proc/{self.process.processes[-1].pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _straight(port: int, lines: list[str]) -> list[socket.socket]:
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in lines]
    for one, line in zip(connections, lines, strict=True):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(f"{line}\n".encode())
    return connections


def _relayed(
    directory: Path, ports: dict[str, int], made: fakes.Certificates, lines: list[str]
) -> list[socket.socket]:
    async def open_all() -> list[socket.socket]:
        broker = await Broker.connect(directory / "control")
        offer = {
            "lease": f"{_LEASE}-{time.monotonic_ns()}",
            "socket": directory / _LEASE,
            "password": f"{_LEASE}-real",
            "station": "127.0.0.1",
            "expires": 30,
        }
        broker.tell(Offer.model_validate(offer))
        await broker.state()
        client = Client(ports, made.trusting())
        main = await client.link()
        copies = []
        for line in lines:
            link = await client.link(main.identifier, DISPLAY)
            link.reader._transport.pause_reading()  # type: ignore[attr-defined]
            copies.append(_copy(link.writer))
            link.writer.write(f"{line}\n".encode())
        broker.close()
        return [*copies, _copy(main.writer)]

    return asyncio.run(open_all())


def _copy(writer: asyncio.StreamWriter) -> socket.socket:
    return socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))


@contextlib.contextmanager
def opened(
    way: Callable[[list[str]], list[socket.socket]], lines: list[str]
) -> Iterator[list[socket.socket]]:
    """Connections for as long as the block runs."""
    connections = way(lines)
    try:
        yield connections[: len(lines)]
    finally:
        for one in connections:
            one.close()
        time.sleep(_PAUSE_SECONDS)


def throughput(way: Callable[[list[str]], list[socket.socket]], number: int, most: float = math.inf) -> float:
    """Bytes per second of so many channels that send as fast as they can. most: how fast they are read."""
    buffer = memoryview(bytearray(BLOCK))
    total = 0
    with opened(way, ["flood"] * number) as connections, selectors.DefaultSelector() as selector:
        for one in connections:
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ)
        began = time.monotonic()
        while (now := time.monotonic()) < began + SECONDS:
            for key, _ in selector.select(1):
                total += key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
            if (early := total / most - (time.monotonic() - began)) > 0:
                time.sleep(early)
    return total / (now - began)


class _Pictures:
    """One channel's stream. delays: seconds from the sending of each picture to its last byte.

    began: pictures that were sent before are not counted, for nobody read yet.
    """

    def __init__(self) -> None:
        self.began = math.inf
        self.delays: list[float] = []
        self._header = b""
        self._missing = 0
        self._sent = 0.0

    def take(self, data: memoryview) -> None:
        while data:
            if self._missing:
                taken = min(self._missing, len(data))
                data, self._missing = data[taken:], self._missing - taken
                if not self._missing and self._sent > self.began:
                    self.delays.append(time.monotonic() - self._sent)
                continue
            taken = _HEADER.size - len(self._header)
            self._header, data = self._header + data[:taken], data[taken:]
            if len(self._header) == _HEADER.size:
                self._sent, self._missing = _HEADER.unpack(self._header)
                self._header = b""


def pictures(
    way: Callable[[list[str]], list[socket.socket]], number: int, megabits: float, seconds: float
) -> list[float]:
    """The delays of all pictures in so many streams of so many Mbit/s."""
    size = int(megabits * 1e6 / 8 / PICTURES_PER_SECOND)
    lines = [f"pictures {size} {one / number / PICTURES_PER_SECOND}" for one in range(number)]
    buffer = memoryview(bytearray(BLOCK))
    streams = [_Pictures() for _ in lines]
    with opened(way, lines) as connections, selectors.DefaultSelector() as selector:
        for one, stream in zip(connections, streams, strict=True):
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ, stream)
            stream.began = time.monotonic()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(1):
                key.data.take(buffer[: key.fileobj.recv_into(buffer)])  # type: ignore[union-attr]
    return [delay for stream in streams for delay in stream.delays]


def answers(way: Callable[[list[str]], list[socket.socket]]) -> list[float]:
    """Seconds from a short message to its answer, one after the other."""
    times = []
    with opened(way, ["answer"]) as (connection,):
        connection.setblocking(True)
        end = time.monotonic() + SECONDS
        while (began := time.monotonic()) < end:
            connection.sendall(bytes(32))
            connection.recv(64)
            times.append(time.monotonic() - began)
            time.sleep(0.001)
    return times


@contextlib.contextmanager
def ways() -> Iterator[Ways]:
    """The machine, the bare loop and the relay, as processes."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        made = fakes.certificates(directory)
        ports = []
        for target in (machine, forwarder):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(directory / _LEASE, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            ports.append(ours.recv())
        config, relay_ports = fakes.with_free_ports(fakes.configuration(directory, made))
        carrier = RelayProcess(config, directory)
        carrier.start()
        stack.callback(carrier.stop)
        asyncio.run(_answered(config.control))
        yield Ways(
            direct=partial(_straight, ports[0]),
            bare=partial(_straight, ports[1]),
            relay=partial(_relayed, directory, relay_ports, made),
            process=carrier,
        )


async def _answered(control: Path) -> None:
    (await fakes.connected(control)).close()


# The tables


def measure() -> list[Rows]:
    """Measure everything, in turn."""
    with ways() as there:
        return [_throughputs(there), _streams(there), _messages(there)]


def _throughputs(there: Ways) -> Rows:
    rows: list[tuple[str, ...]] = []
    for gigabits, number in itertools.product((None, *_NETWORKS), (1, 32)):
        most = gigabits * 1e9 / 8 if gigabits else math.inf
        ways = {"relay": there.relay, **({"bare": there.bare} if number == 1 else {})}
        direct: list[float] = []
        through: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS if most == math.inf else 2):
            direct.append(throughput(there.direct, number, most))
            for name, way in ways.items():
                through[name].append(throughput(way, number, most))
        ratios = {
            name: statistics.median(one / other for one, other in zip(rates, direct, strict=True))
            for name, rates in through.items()
        }
        rows.append(
            (
                f"{gigabits} Gbit/s" if gigabits else "none",
                str(number),
                _rate(direct),
                _rate(through["relay"]),
                f"{ratios['relay']:.2f}",
                "at least 0.8",
                met(ratios["relay"] >= 0.8),
                f"{ratios['bare']:.2f}" if "bare" in ratios else "",
            )
        )
    columns = (
        "limit of the network",
        "channels",
        "directly",
        "through the relay",
        "ratio",
        "wanted",
        "reached",
    )
    return Rows("The relay's throughput", (*columns, "a bare loop's ratio"), tuple(rows))


def _streams(there: Ways) -> Rows:
    rows = []
    for number, megabits in ((1, 100), (32, 50), (32, 100)):
        for name, way in (("directly", there.direct), ("through the relay", there.relay)):
            before = there.relay_seconds()
            seconds = 2 * SECONDS
            delays = pictures(way, number, megabits, seconds)
            used = (there.relay_seconds() - before) / seconds if way is there.relay else None
            share = len(delays) / (number * PICTURES_PER_SECOND * seconds)
            rows.append(
                (
                    f"{number} x {megabits} Mbit/s, {name}",
                    f"{share:.0%}",
                    *_delays(delays),
                    "" if used is None else f"{used:.0%}",
                )
            )
    columns = ("streams", "pictures that came", "delay, p50", "p99", "the relay's processor time")
    return Rows(f"Streams of {PICTURES_PER_SECOND} pictures per second", columns, tuple(rows))


def _messages(there: Ways) -> Rows:
    rows = []
    for name, way in (("directly", there.direct), ("through the relay", there.relay)):
        rows.append((f"{name}, nothing else under way", *_delays(answers(way))))
    with _busy(there):
        rows.append(("through the relay, beside 32 x 50 Mbit/s", *_delays(answers(there.relay))))
    return Rows("A short message and its answer", ("way", "p50", "p99"), tuple(rows))


@contextlib.contextmanager
def _busy(there: Ways) -> Iterator[None]:
    """Streams through the relay for as long as the block runs, read by a process of their own."""
    context = get_context("fork")
    reading = context.Process(target=pictures, args=(there.relay, 32, 50, 3600.0), daemon=True)
    reading.start()
    time.sleep(SECONDS)
    try:
        yield
    finally:
        reading.terminate()
        reading.join()


def _rate(values: list[float]) -> str:
    low, middle, high = (value / 1e9 for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.2f} GB/s ({low:.2f} to {high:.2f})"


def _delays(values: list[float]) -> tuple[str, str]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"{1000 * cuts[49]:.2f} ms", f"{1000 * cuts[98]:.2f} ms"


if __name__ == "__main__":
    for table in measure():
        print(table.markdown(), flush=True)
