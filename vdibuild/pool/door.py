"""Lets a client in: answers its link, reads its ticket, and links to its machine in its place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import Protocol

from vdibuild.pool import machine_link, spice
from vdibuild.pool.machine_link import MachineError, MachineLink, Opening
from vdibuild.pool.routes import RefusedError, Routes, Session, Standing
from vdibuild.pool.spice import Capabilities, LinkError, LinkMessage, LinkReply, SpiceError, TicketKey
from vdibuild.pool.stream import Stream


@dataclass(frozen=True)
class Passage:
    """A channel that is open. greeting: what the client has to get before all that the machine sends. inputs:
    it is the keyboard's and the mouse's.
    """

    session: Session
    machine: Stream
    greeting: bytes
    main: bool
    inputs: bool = False


class Owner(Protocol):
    """Who is told of what happens at the door, at once and in the task that opens the channel."""

    def linked(self, session: Session) -> None:
        """A client began a session."""

    def machine_failed(self, lease: str, error: MachineError) -> None:
        """A client came, but the machine did not do what it should."""

    def lapsed(self, standing: Standing) -> None:
        """An offer ended while a client was being let in, who was not."""


class Door:
    """The door. channels: how many a session may have."""

    def __init__(self, routes: Routes, owner: Owner, channels: int) -> None:
        self._routes = routes
        self._owner = owner
        self._channels = channels
        self._key = TicketKey()

    async def open(self, stream: Stream, address: str, secure: bool) -> Passage:
        """Open a channel for the client of `stream`. secure: it came over TLS.

        Raises RefusedError after the client was told, OSError and EOFError when it is gone. There is no
        point between the owner's being told of a session and the return where this could be interrupted.
        """
        client = _Client(stream)
        try:
            message = await client.ask()
            if message.channel == spice.MAIN_CHANNEL:
                return await self._begin(client, message, address, secure)
            return await self._join(client, message, address, secure)
        except (RefusedError, SpiceError) as error:
            await client.refuse(error.code)
            raise RefusedError(error.message, error.code) from None

    async def _begin(self, client: _Client, message: LinkMessage, address: str, secure: bool) -> Passage:
        """A main channel: the first link of a session."""
        if message.connection:
            raise RefusedError("a main channel of a session that has one", LinkError.BAD_CONNECTION_ID)
        candidates = await _known(self._routes.candidates(address, secure))
        # Which machine it will be is known only after the ticket, but the client has to be answered before.
        common = reduce(and_, (one.capabilities for one in candidates if one.capabilities is not None))
        password = await client.answer(self._key, common)
        standing = self._routes.take(candidates, address, password)
        link: MachineLink | None = None
        try:
            understood = message.capabilities
            if not common.has(spice.MINI_HEADER):
                understood = understood.without(spice.MINI_HEADER)
            link = await machine_link.reach(standing.offer.socket, replace(message, capabilities=understood))
            opening = await _opened_main(link, standing.offer.password)
            session = self._routes.link(standing, address, opening.machine_identifier)
        except BaseException as error:
            if link is not None:
                link.stream.close()
            if not self._routes.give_back(standing):
                self._owner.lapsed(standing)
            if isinstance(error, MachineError):
                self._owner.machine_failed(standing.offer.lease, error)
                raise RefusedError("the machine failed", LinkError.ERROR) from None
            raise
        self._owner.linked(session)
        greeting = spice.word(LinkError.OK) + opening.for_client(session.identifier)
        return Passage(session, link.stream, greeting, main=True)

    async def _join(self, client: _Client, message: LinkMessage, address: str, secure: bool) -> Passage:
        """A further channel of a session."""
        session = self._routes.find(message.connection, address, secure)
        self._check_room(session)
        link: MachineLink | None = None
        try:
            link = await machine_link.reach(
                session.socket, replace(message, connection=session.machine_identifier)
            )
            reply = await link.ask()
            if reply.error:
                raise RefusedError("the machine refuses a channel", _code(reply.error))
            password = await client.answer(self._key, reply.capabilities)
            if not session.admits(password):
                raise RefusedError("a wrong ticket for a session's channel")
            result = await link.log_in(session.password)
            if result:
                raise RefusedError("the machine refuses a channel", _code(result))
            if self._routes.session(session.lease) is not session:
                raise RefusedError("an unknown session", LinkError.BAD_CONNECTION_ID)
            self._check_room(session)
        except BaseException as error:
            if link is not None:
                link.stream.close()
            if isinstance(error, MachineError):
                self._owner.machine_failed(session.lease, error)
                raise RefusedError("the machine failed", LinkError.ERROR) from None
            raise
        inputs = message.channel == spice.INPUTS_CHANNEL
        return Passage(session, link.stream, spice.word(LinkError.OK), main=False, inputs=inputs)

    def _check_room(self, session: Session) -> None:
        if session.channels >= self._channels:
            raise RefusedError("too many channels in a session", LinkError.CHANNEL_NOT_AVAILABLE)


class _Client:
    """The client's side of a link."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._message = LinkMessage(0, 0, 0, Capabilities())
        self._answered = False

    async def ask(self) -> LinkMessage:
        """What it wants. Raises SpiceError."""
        size = spice.parse_header(await self._stream.read(spice.HEADER_BYTES))
        self._message = spice.parse_link(await self._stream.read(size))
        return self._message

    async def answer(self, key: TicketKey, capabilities: Capabilities) -> bytes:
        """Tell it what its machine can do; returns its password. Raises RefusedError, SpiceError."""
        # SASL would end in the machine, where the client has no account.
        capabilities = capabilities.without(spice.AUTH_SASL)
        await self._stream.write(spice.build_reply(LinkReply(LinkError.OK, key.public, capabilities)))
        self._answered = True
        if (
            machine_link.can_choose(self._message.capabilities, capabilities)
            and spice.parse_word(await self._stream.read(4)) != spice.AUTH_SPICE
        ):
            raise RefusedError("another way to log in than by a ticket")
        return key.decrypt(await self._stream.read(spice.TICKET_BYTES))

    async def refuse(self, code: LinkError) -> None:
        """Tell it why it is not let in: in the reply, or in the result of its ticket."""
        await self._stream.write(spice.word(code) if self._answered else spice.build_refusal(code))


async def _known(candidates: Sequence[Standing]) -> list[Standing]:
    """Those whose machines have answered, after waiting for the first where none has. Raises RefusedError."""
    if not any(one.known.is_set() for one in candidates):
        waiting = [asyncio.ensure_future(one.known.wait()) for one in candidates]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
    known = [one for one in candidates if one.capabilities is not None]
    if not known:
        raise RefusedError("the machine failed", LinkError.ERROR)
    return known


async def _opened_main(link: MachineLink, password: str) -> Opening:
    reply = await link.ask()
    if reply.error:
        raise MachineError(f"the machine refuses a link: error {reply.error}")
    result = await link.log_in(password)
    if result:
        raise MachineError(f"the machine refuses its own password: error {result}")
    return await link.open_main()


def _code(number: int) -> LinkError:
    try:
        return LinkError(number)
    except ValueError:
        return LinkError.ERROR
