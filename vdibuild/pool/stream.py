"""Bytes between sockets, plain or TLS: exact reads while a channel opens, then a pump in both directions.

asyncio's own transports copy what they read into new objects and queue what they write; a relay needs
neither. Here all pumps share a few buffers: one that is read into is free again as soon as it is sent, so
that a channel at rest holds no memory, and one with a slow reader a single buffer. splice(2), which copies
nothing, was measured to take a quarter to a half more processor time (a unix socket to TCP, Linux 6.18).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

# All that a machine's unix socket holds: Linux lets the machine go on when three quarters of that are read
# (unix_writable in net/unix/af_unix.c), and it fills the socket again while this is sent.
BUFFER_BYTES = 1 << 18

# Where there is much to carry, so many reads follow each other before others get their turn.
_TURN = 32
_MUCH = BUFFER_BYTES // 8
_SPARE = 64
_DRAIN_BYTES = 1 << 16
_RETRY_SECONDS = 0.01

_WANT_READ = (BlockingIOError, ssl.SSLWantReadError)
_WANT_WRITE = (BlockingIOError, ssl.SSLWantWriteError)

_spare: list[memoryview] = []


class Counter:
    """How many bytes went one way."""

    def __init__(self, count: int = 0) -> None:
        self.bytes = count


class Stream:
    """A connected, non-blocking socket. Its methods raise OSError, and EOFError where the peer has ended."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._loop = asyncio.get_running_loop()

    async def secure(self, context: ssl.SSLContext) -> None:
        """Do the server's side of a TLS handshake; what follows is encrypted."""
        secured = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.socket = secured
        while True:
            try:
                return secured.do_handshake()
            except ssl.SSLWantReadError:
                await self._readable()
            except ssl.SSLWantWriteError:
                await self._writable()

    async def read(self, size: int) -> bytes:
        """Exactly so many bytes, and none that follow."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                got = self.socket.recv_into(view)
            except _WANT_READ:
                await self._readable()
                continue
            if not got:
                raise EOFError("the connection was closed")
            view = view[got:]
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except _WANT_WRITE:
                await self._writable()

    async def finish(self) -> None:
        """Say that nothing follows, and wait until the peer ends as well; what it still sends is dropped.

        To close with something unread would take back what was written last.
        """
        if not isinstance(self.socket, ssl.SSLSocket):
            self.socket.shutdown(socket.SHUT_WR)
        dropped = 0
        while dropped < _DRAIN_BYTES:
            try:
                data = self.socket.recv(_DRAIN_BYTES)
            except _WANT_READ:
                await self._readable()
                continue
            if not data:
                return
            dropped += len(data)

    def close(self) -> None:
        """Let go of the socket, whatever is under way."""
        descriptor = self.socket.fileno()
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        self.socket.close()

    async def _readable(self) -> None:
        await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def _writable(self) -> None:
        await self._ready(self._loop.add_writer, self._loop.remove_writer)

    async def _ready(
        self, add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool]
    ) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        descriptor = self.socket.fileno()
        add(descriptor, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            remove(descriptor)


async def connect(path: Path) -> Stream:
    """Connect to a unix socket."""
    stream = Stream(socket.socket(socket.AF_UNIX))
    try:
        while True:
            try:
                stream.socket.connect(str(path))
                return stream
            except BlockingIOError:
                # Its queue of connections is full, and nothing tells when it is no longer.
                await asyncio.sleep(_RETRY_SECONDS)
    except BaseException:
        stream.close()
        raise


async def pump(client: Stream, machine: Stream, inward: Counter, outward: Counter) -> str:
    """Carry bytes both ways until either side ends; returns which, as a sentence for a log.

    inward counts what the machine got, outward what the client got. Neither stream is closed.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[str] = loop.create_future()

    def end(reason: str) -> None:
        if not over.done():
            over.set_result(reason)

    ways = (
        _Way(loop, client.socket, machine.socket, inward, "the client", "the machine", end),
        _Way(loop, machine.socket, client.socket, outward, "the machine", "the client", end),
    )
    try:
        for way in ways:
            way.begin()
        return await over
    finally:
        for way in ways:
            way.stop()


class _Way:
    """One direction of a pump: reads when there is nothing left to send, else waits until it can be sent."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: socket.socket,
        sink: socket.socket,
        counter: Counter,
        source_name: str,
        sink_name: str,
        end: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._counter = counter
        self._source_name = source_name
        self._sink_name = sink_name
        self._end = end
        self._secured = source if isinstance(source, ssl.SSLSocket) else None
        self._rest = memoryview(b"")
        self._held: memoryview | None = None
        self._stopped = False

    def begin(self) -> None:
        self._loop.add_reader(self._source, self._read)
        # What a TLS socket has decrypted already does not make it readable.
        self._read()

    def stop(self) -> None:
        self._stopped = True
        self._rest = memoryview(b"")
        self._release()
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._sink)

    def _read(self) -> None:
        for _ in range(_TURN):
            if self._stopped or self._rest:
                return
            self._held = _spare.pop() if _spare else memoryview(bytearray(BUFFER_BYTES))
            size = self._received(self._held)
            if size:
                self._counter.bytes += size
                self._forward(self._held[:size])
            if not self._rest:
                self._release()
            # A TLS socket may hold more than the kernel knows of.
            if not size or (size < _MUCH and not (self._secured and self._secured.pending())):
                return
        if not self._stopped:
            self._loop.call_soon(self._read)

    def _received(self, buffer: memoryview) -> int:
        """Read what there is now; 0 where there is nothing, or the source has ended."""
        try:
            size = self._source.recv_into(buffer)
        except _WANT_READ:
            return 0
        except OSError as error:
            self._over(f"{self._source_name} was lost: {error.strerror or error}")
            return 0
        if not size:
            self._over(f"{self._source_name} ended it")
        return size

    def _forward(self, data: memoryview) -> None:
        """Send what the sink takes now. If that is not all, nothing is read until it has taken the rest."""
        rest = data[self._send(data) :]
        if rest and not self._stopped:
            self._rest = rest
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._flush)

    def _flush(self) -> None:
        self._rest = self._rest[self._send(self._rest) :]
        if not self._rest and not self._stopped:
            self._release()
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._read)
            self._read()

    def _release(self) -> None:
        if self._held is not None and len(_spare) < _SPARE:
            _spare.append(self._held)
        self._held = None

    def _send(self, data: memoryview) -> int:
        try:
            return self._sink.send(data)
        except _WANT_WRITE:
            return 0
        except OSError as error:
            self._over(f"{self._sink_name} was lost: {error.strerror or error}")
            return 0

    def _over(self, reason: str) -> None:
        self.stop()
        self._end(reason)
