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
        self._clients: set[_Client] = set()
        self._refused = 0

    @contextlib.asynccontextmanager
    async def serving(self, listening: socket.socket) -> AsyncIterator[None]:
        """Serve clients that connect to a listening socket for as long as the block runs."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Client(self), sock=listening, backlog=1024)
        try:
            yield
        finally:
            server.close()
            for client in list(self._clients):
                client.hang_up()
            await server.wait_closed()

    def _came(self, client: _Client) -> None:
        self._clients.add(client)
        try:
            client.stand(self._broker.enter(Station(client.address, client.address)))
        except FullError as error:
            # Not sent away at once: its loop would be back immediately.
            self._refused += 1
            client.refuse(error.message if self._refused <= _REFUSED else None)

    def _went(self, client: _Client, refused: bool) -> None:
        self._clients.discard(client)
        self._refused -= refused


class _Client(asyncio.Protocol):
    """A connected client. No task stands behind it: a thousand may come at the same moment."""

    def __init__(self, port: SignalPort) -> None:
        self.address = ""
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._place: Place | None = None
        self._offer: Offer | None = None
        self._refused = False
        self._due = 0.0  # when the phrase is to be said again, by the event loop's clock
        self._next: asyncio.Handle | None = None

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (a connection's is one)
        self._transport = transport
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        self.address = str(transport.get_extra_info("peername")[0]).removeprefix("::ffff:")
        self._port._came(self)

    def data_received(self, data: bytes) -> None:
        self._transport.pause_reading()  # it has nothing to say

    def eof_received(self) -> bool:
        return True  # it is there all the same; that it is not shows when something is sent, in two lines

    def connection_lost(self, error: Exception | None) -> None:
        if self._next:
            self._next.cancel()
        if self._place:
            self._place.leave()
        self._port._went(self, self._refused)

    # What the port tells

    def stand(self, place: Place) -> None:
        """Tell it its place until it is offered a machine."""
        self._place = place
        place.offered.add_done_callback(self._offered)
        self._next = self._loop.call_soon(self._wait)  # where a machine is clean, it is offered by then

    def refuse(self, reason: str | None) -> None:
        """Turn it away."""
        self._refused = True
        if reason is None:
            self.hang_up()
        else:
            self._say(f"COME BACK LATER: {reason}")
            self._next = self._loop.call_later(BEAT_SECONDS, self.hang_up)

    def hang_up(self) -> None:
        """End the connection; one that does not read would not let it end."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def _wait(self) -> None:
        if self._place and not self._place.offered.done():
            self._say(f"NO CLEAN MACHINE YET, YOUR PLACE IN LINE IS {self._place.position}")
            self._next = self._loop.call_later(BEAT_SECONDS, self._wait)

    def _offered(self, offered: asyncio.Future[Offer]) -> None:
        if self._transport.is_closing() or offered.cancelled():
            return
        self._offer = offered.result()
        self._due = self._loop.time()
        self._offer.settled.add_done_callback(self._settled)
        self._call()

    def _call(self) -> None:
        """Repeat the phrase until the client has linked, or the offer lapsed."""
        if self._offer is None or self._offer.settled.done():
            return
        if self._next:
            self._next.cancel()
        now = self._loop.time()
        if now < self._due:
            self._say(f"{self._offer.machine.name} IS WAITING FOR YOU")
        elif now < self._offer.expires:
            self._say(PHRASE)
            self._due += PHRASE_SECONDS
        else:
            self._say("NO CONNECTION YET, THE OFFER ENDS")
        self._next = self._loop.call_later(min(BEAT_SECONDS, max(self._due - now, 0.01)), self._call)

    def _settled(self, _: asyncio.Future[None]) -> None:
        if self._offer and not self._transport.is_closing():
            name = self._offer.machine.name
            linked = self._offer.linked
            self._say(f"{name} IS IN USE" if linked else f"NO CONNECTION CAME, {name} IS WITHDRAWN")
            self.hang_up()

    def _say(self, text: str) -> None:
        """Send a line; to a client that does not read, nothing."""
        if not self._transport.is_closing() and self._transport.get_write_buffer_size() < _UNREAD:
            self._transport.write(text.replace("\\", "/").encode("ascii", "replace") + b"\n")
