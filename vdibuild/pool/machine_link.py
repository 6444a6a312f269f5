"""The relay's side towards a machine: links to it as a client does, with the machine's real password."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vdibuild.errors import VdibuildError
from vdibuild.pool import spice
from vdibuild.pool.spice import Capabilities, LinkMessage, LinkReply, SpiceError
from vdibuild.pool.stream import Stream, connect

# MAIN_INIT comes first from every server known; a few messages before it would do no harm.
_MESSAGES = 16
_MESSAGE_BYTES = 1 << 16


class MachineError(VdibuildError):
    """A machine does not do what it should: it is gone, or refuses its own password."""


@dataclass(frozen=True)
class Opening:
    """A main channel up to its MAIN_INIT: the machine's id of the session, and what the client must get."""

    machine_identifier: int
    before: bytes
    header: bytes
    body: bytes

    def for_client(self, identifier: int) -> bytes:
        """The bytes for the client, who is to know the session by this id."""
        return self.before + self.header + spice.with_identifier(self.body, identifier)


class MachineLink:
    """A connection to a machine on which a channel is being opened."""

    def __init__(self, stream: Stream, message: LinkMessage) -> None:
        self.stream = stream
        self._message = message
        self._reply = LinkReply(0, b"", Capabilities())

    async def ask(self) -> LinkReply:
        """Send the link message; returns the machine's reply, which may be an error. Raises MachineError."""
        try:
            await self.stream.write(spice.build_link(self._message))
            size = spice.parse_header(await self.stream.read(spice.HEADER_BYTES))
            self._reply = spice.parse_reply(await self.stream.read(size))
        except (OSError, EOFError, SpiceError) as error:
            raise MachineError(f"the machine does not answer a link: {error}") from None
        return self._reply

    async def log_in(self, password: str) -> int:
        """Send the password; returns the machine's result, 0 or a link error. Raises MachineError."""
        try:
            ticket = spice.encrypt_ticket(password, self._reply.key)
            if can_choose(self._message.capabilities, self._reply.capabilities):
                ticket = spice.word(spice.AUTH_SPICE) + ticket
            await self.stream.write(ticket)
            return spice.parse_word(await self.stream.read(4))
        except (OSError, EOFError, SpiceError) as error:
            raise MachineError(f"the machine does not let us in: {error}") from None

    async def open_main(self) -> Opening:
        """Read a main channel up to the session's id. Raises MachineError."""
        mini = self._message.capabilities.has(spice.MINI_HEADER)
        mini = mini and self._reply.capabilities.has(spice.MINI_HEADER)
        before = b""
        try:
            for _ in range(_MESSAGES):
                header = await self.stream.read(spice.data_header_bytes(mini))
                data = spice.parse_data_header(header, mini)
                if data.size > _MESSAGE_BYTES:
                    break
                body = await self.stream.read(data.size)
                if data.kind == spice.MAIN_INIT:
                    return Opening(spice.parse_main_init(body), before, header, body)
                before += header + body
        except (OSError, EOFError, SpiceError) as error:
            raise MachineError(f"the machine does not begin a session: {error}") from None
        raise MachineError("the machine does not begin a session: no MAIN_INIT comes")


def can_choose(client: Capabilities, server: Capabilities) -> bool:
    """Whether the client tells by which mechanism it logs in."""
    return client.has(spice.AUTH_SELECTION) and server.has(spice.AUTH_SELECTION)


async def reach(socket: Path, message: LinkMessage) -> MachineLink:
    """Connect to a machine, for a channel. Raises MachineError."""
    try:
        return MachineLink(await connect(socket), message)
    except OSError as error:
        raise MachineError(f"the machine cannot be reached: {error.strerror or error}") from None


async def main_capabilities(socket: Path) -> Capabilities:
    """What a machine can do on its main channel; it takes no notice of being asked. Raises MachineError."""
    wanted = Capabilities((1 << spice.AUTH_SELECTION | 1 << spice.AUTH_SPICE | 1 << spice.MINI_HEADER,))
    link = await reach(socket, LinkMessage(0, spice.MAIN_CHANNEL, 0, wanted))
    try:
        reply = await link.ask()
    finally:
        link.stream.close()
    if reply.error:
        raise MachineError(f"the machine refuses a link: error {reply.error}")
    return reply.capabilities
