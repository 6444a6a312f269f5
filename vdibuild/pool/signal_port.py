"""The signal port: tells old clients, which run `nc -i 1 SERVER 5905`, when to link to the SPICE port.

The protocol is that of the scripts these clients came with: lines that end in LF, and one phrase. A client
acts on any line that contains the phrase, logs every other one, and says nothing: the end of what it sends,
which comes at once where its standard input is closed, does not mean that it is gone. It gives up after a
second of silence. It reads lines with the shell's `read`, so that no line may hold a backslash. Nobody reads
any more once the session has begun, so nothing here ever waits for a client to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

from vdibuild.pool.broker import Broker, FullError, Offer, Place, Station

PHRASE = "RULE ADDED, CONNECT NOW!"
"""What a client waits for."""

BEAT_SECONDS = 0.4
"""A line is sent this often at least: ncat gives up after a second, and a busy host may be late."""

PHRASE_SECONDS = 1.0
"""How often the phrase is repeated."""

_UNREAD = 4096  # bytes that wait for a client, here and as many in the kernel, before it gets no more
_DEAD_SECONDS = 10  # without any sign from a station: it was switched off, and must not be offered a machine
_REFUSED = 100  # clients that are told at one time why they are turned away

_log = logging.getLogger(__name__)


class SignalPort:
    """Serves the signal port for one pool's broker; see `serving`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._clients: set[asyncio.Task[None]] = set()
        self._refused = 0

    @contextlib.asynccontextmanager
    async def serving(self, listening: socket.socket) -> AsyncIterator[None]:
        """Serve clients that connect to a listening socket for as long as the block runs."""
        server = await asyncio.start_server(self._client, sock=listening, limit=_UNREAD, backlog=1024)
        try:
            yield
        finally:
            server.close()
            for task in self._clients:
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            await server.wait_closed()

    async def _client(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (it runs in one)
        self._clients.add(task)
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        leaving = asyncio.create_task(_lost(writer))
        try:
            await self._serve(_Client(writer, leaving))
        finally:
            self._clients.discard(task)
            leaving.cancel()
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # it does not read, and would not let this end
            else:
                writer.close()

    async def _serve(self, client: _Client) -> None:
        try:
            place = self._broker.enter(Station(client.address, client.address))
        except FullError as error:
            await self._refuse(client, error)
            return
        try:
            await asyncio.sleep(0)  # where a machine is clean, it is offered by then
            await self._wait(client, place)
            if place.offered.done():
                await self._call(client, place.offered.result())
        finally:
            place.leave()

    async def _refuse(self, client: _Client, error: FullError) -> None:
        """Turn a client away, not at once: its loop would be back immediately."""
        if self._refused >= _REFUSED:
            return
        self._refused += 1
        try:
            client.say(f"COME BACK LATER: {error.message}")
            await client.gone_within(BEAT_SECONDS)
        finally:
            self._refused -= 1

    async def _wait(self, client: _Client, place: Place) -> None:
        """Tell a client its place until it is offered a machine, or goes away."""
        while not place.offered.done() and not client.gone:
            client.say(f"NO CLEAN MACHINE YET, YOUR PLACE IN LINE IS {place.position}")
            await asyncio.wait(
                (place.offered, client.leaving), timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )

    async def _call(self, client: _Client, offer: Offer) -> None:
        """Repeat the phrase until the client has linked, or the offer lapsed."""
        loop = asyncio.get_running_loop()
        settled = asyncio.create_task(offer.settled.wait())
        due = loop.time()
        try:
            while not settled.done() and not client.gone:
                if loop.time() < due:
                    client.say(f"{offer.machine.name} IS WAITING FOR YOU")
                elif loop.time() < offer.expires:
                    client.say(PHRASE)
                    due += PHRASE_SECONDS
                else:
                    client.say("NO CONNECTION YET, THE OFFER ENDS")
                pause = min(BEAT_SECONDS, max(due - loop.time(), 0.01))
                await asyncio.wait(
                    (settled, client.leaving), timeout=pause, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            settled.cancel()
        name = offer.machine.name
        client.say(f"{name} IS IN USE" if offer.linked else f"NO CONNECTION CAME, {name} IS WITHDRAWN")


class _Client:
    """A connected client. leaving: done when it went away."""

    def __init__(self, writer: asyncio.StreamWriter, leaving: asyncio.Task[None]) -> None:
        self.address = str(writer.get_extra_info("peername")[0]).removeprefix("::ffff:")
        self.leaving = leaving
        self._writer = writer

    @property
    def gone(self) -> bool:
        return self.leaving.done()

    async def gone_within(self, seconds: float) -> None:
        await asyncio.wait((self.leaving,), timeout=seconds)

    def say(self, text: str) -> None:
        """Send a line; to a client that does not read, nothing."""
        transport = self._writer.transport
        if not transport.is_closing() and transport.get_write_buffer_size() < _UNREAD:
            self._writer.write(text.replace("\\", "/").encode("ascii", "replace") + b"\n")


async def _lost(writer: asyncio.StreamWriter) -> None:
    """Wait until a connection is lost: that shows when something is written, so it takes two lines."""
    with contextlib.suppress(OSError):
        await writer.wait_closed()
