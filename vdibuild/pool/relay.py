"""The relay: one SPICE port for all stations; carries each channel to the machine of its lease.

It is a process of its own, told by the broker who may come in (see `control`), and lives on without it.
No client learns a machine's password, and no machine is on any network: the relay itself answers a client's
link, with a key of its own, reads the client's ticket, and links to the machine's unix socket in its place.
The session's id in MAIN_INIT is replaced by one that the relay draws: the machines' own may be alike.

    python -m vdibuild.pool.relay CONFIG      # a JSON file, see `Config`

A relay that finds another one at its control socket takes over from it: the listening sockets, the offers,
and the knowledge of the sessions, whose channels live on in the old process until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, ValidationError

from vdibuild.errors import HostError, InputError, VdibuildError
from vdibuild.pool import control, handover, machine_link, service_manager
from vdibuild.pool.admission import Admission
from vdibuild.pool.control import (
    Acknowledge,
    Command,
    End,
    Ended,
    Error,
    Estate,
    Event,
    GetState,
    Linked,
    Offer,
    OfferState,
    Refused,
    Replace,
    Revoke,
    SessionState,
    State,
    Stop,
)
from vdibuild.pool.door import Door, Passage
from vdibuild.pool.events import EventLog, Refusals
from vdibuild.pool.machine_link import MachineError
from vdibuild.pool.pauses import freeze
from vdibuild.pool.routes import RefusedError, Routes, Session, Standing, plain_address
from vdibuild.pool.spice import Capabilities
from vdibuild.pool.stream import Counter, Stream, pump

_ACCEPTED_AT_ONCE = 64
_BREATH_SECONDS = 0.2  # when there are no descriptors left
_REFUSALS_SECONDS = 1.0
_UNREAD_BYTES = 1 << 24  # a broker that does not read is let go; what it missed is kept
_HANDOVER_SECONDS = 5.0
_FINISH_SECONDS = 2.0
_BACKLOG = 1024

# A station that lost its power is noticed after about a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_UNACKNOWLEDGED_MILLISECONDS = 60_000

_log = logging.getLogger(__name__)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Listener(_Model):
    """Where the relay listens."""

    address: IPvAnyAddress
    """An address of this host in the stations' network."""
    port: Annotated[int, Field(ge=0, le=65535)]
    """0: any free one."""


class SecureListener(Listener):
    """Where the relay listens for TLS."""

    certificate: Path
    """Its certificate and those that lead to the CA, PEM."""
    key: Path
    """The certificate's private key, PEM."""


class Limits(_Model):
    """What strangers may take."""

    link_seconds: Annotated[float, Field(gt=0)] = 10
    """How long a client may take to open a channel."""
    half_open: Annotated[int, Field(gt=0)] = 1024
    """How many channels may be opening, in all."""
    half_open_per_address: Annotated[int, Field(gt=0)] = 64
    """How many from one address; a viewer opens about ten at once."""
    channels: Annotated[int, Field(gt=0)] = 64
    """How many channels a session may have."""
    offers: Annotated[int, Field(gt=0)] = 10_000
    """How many offers may stand."""


class Config(_Model):
    """The relay's configuration."""

    control: Path
    """The unix socket on which it takes commands."""
    plain: Listener | None = None
    """Where old clients come to, which know no TLS and no ticket."""
    tls: SecureListener | None = None
    """Where clients with a .vv file come to."""
    limits: Limits = Field(default_factory=Limits)


def load(path: Path) -> Config:
    """Read the configuration. Raises InputError."""
    try:
        config = Config.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(path, None, f"cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(path, None, f"{key}: {first['msg']}") from None
    if config.plain is None and config.tls is None:
        raise InputError(path, None, "names no port to listen on", "give `plain`, `tls` or both")
    return config


class Relay:
    """The service (see the module); `serve` runs it until it is told to stop, or has handed over and drained.

    inherited: what an older relay handed over. given: the control socket, where somebody else made it
    and will remove it. Raises HostError when a port or the certificate cannot be used.
    """

    def __init__(
        self,
        config: Config,
        inherited: handover.Inheritance | None = None,
        given: socket.socket | None = None,
    ) -> None:
        self._limits = config.limits
        self._control = config.control
        self._context = _tls_context(config.tls) if config.tls else None
        there = inherited.listeners if inherited else {}
        self._listeners = _listeners(config, {handover.CONTROL: given} if given else there)
        self._routes = Routes(time.monotonic, config.limits.offers)
        self._door = Door(self._routes, self, config.limits.channels)
        self._admission = Admission(config.limits.half_open, config.limits.half_open_per_address)
        self._events = EventLog()
        self._refusals = Refusals()
        self._brokers: set[_Broker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._channels: dict[str, set[asyncio.Task[None]]] = {}
        self._mains: dict[str, asyncio.Task[None]] = {}
        self._reasons: dict[str, str] = {}
        self._inherited = inherited
        self._earlier: dict[str, tuple[int, int]] = {}
        self._predecessor: asyncio.StreamWriter | None = None
        self._draining = False
        self._stopped = asyncio.Event()

    @property
    def ports(self) -> dict[str, int]:
        """The ports listened on, by `plain` and `tls`."""
        return {
            name: listener.getsockname()[1]
            for name, listener in self._listeners.items()
            if name != handover.CONTROL
        }

    async def serve(self) -> None:
        """Serve until `stop`, or until a successor has taken over and the last session here has ended."""
        if self._inherited:
            await self._inherit(self._inherited)
        self._listen()
        for name, port in self.ports.items():
            _log.info("listening for %s SPICE on port %d", name, port)
        try:
            await self._stopped.wait()
        finally:
            await self._shut_down()

    def stop(self) -> None:
        """End every session, tell the broker, and return from `serve`."""
        self._stopped.set()

    # What the door tells (see door.Owner)

    def linked(self, session: Session) -> None:
        """A client began a session, in the task that runs now."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (the door is opened in tasks only)
        self._mains[session.lease] = task
        self._emit(Linked(lease=session.lease, address=session.address))

    def machine_failed(self, lease: str, error: MachineError) -> None:
        """A machine did not do what it should."""
        self._emit(Error(lease=lease, message=error.message))

    def lapsed(self, standing: Standing) -> None:
        """An offer ended while a client was being let in."""
        self._emit(Ended(lease=standing.offer.lease, reason=standing.withdrawn or "it expired"))

    # Connections

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for name, listener in self._listeners.items():
            loop.add_reader(listener, self._accept, name, listener)

    def _stop_listening(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners.values():
            loop.remove_reader(listener)

    def _accept(self, name: str, listener: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause(name, listener, error)
                    return
                continue  # the client was gone before it was accepted
            if name == handover.CONTROL:
                self._start(self._attend(connection))
            else:
                self._welcome(connection, plain_address(address[0]), secure=name == handover.TLS)

    def _pause(self, name: str, listener: socket.socket, error: OSError) -> None:
        _log.warning("cannot accept connections just now: %s", error.strerror)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def resume() -> None:
            if not self._draining and not self._stopped.is_set():
                loop.add_reader(listener, self._accept, name, listener)

        loop.call_later(_BREATH_SECONDS, resume)

    def _welcome(self, connection: socket.socket, address: str, secure: bool) -> None:
        task: asyncio.Task[None] | None = None

        def go() -> None:
            self._refused(address, "too many links at once")
            if task is not None:
                task.cancel()

        place = self._admission.enter(address, go)
        if place is None:
            connection.close()
            self._refused(address, "too many links at once")
            return
        with contextlib.suppress(OSError):
            _tune(connection)
        stream = Stream(connection)
        task = self._start(self._receive(stream, address, secure, place))
        self._opening.add(task)
        self._settled.clear()
        task.add_done_callback(self._opened)
        # Not in the task, which may be cancelled before it has begun.
        task.add_done_callback(lambda _: stream.close())

    async def _receive(self, stream: Stream, address: str, secure: bool, place: int) -> None:
        """Open a channel, and serve it to its end."""
        passage = await self._open(stream, address, secure, place)
        if passage is not None:
            await self._carry(stream, passage)

    async def _open(self, stream: Stream, address: str, secure: bool, place: int) -> Passage | None:
        try:
            async with asyncio.timeout(self._limits.link_seconds):
                if secure and self._context is not None:
                    await stream.secure(self._context)
                try:
                    return await self._door.open(stream, address, secure)
                except RefusedError as error:
                    self._refused(address, error.message)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_FINISH_SECONDS):
                            await stream.finish()
        except TimeoutError:
            self._refused(address, "a link was not completed in time")
        except ssl.SSLError as error:
            self._refused(address, f"TLS failed: {error.reason or error}")
        except (OSError, EOFError) as error:
            _log.debug("a link from %s was lost: %s", address, error)
        finally:
            self._admission.leave(address, place)
            self._opened(asyncio.current_task())
        return None

    def _opened(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._opening.discard(task)
        if not self._opening:
            self._settled.set()

    # Sessions

    async def _carry(self, stream: Stream, passage: Passage) -> None:
        session = passage.session
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (channels are served in tasks only)
        tasks = self._channels.setdefault(session.lease, set())
        tasks.add(task)
        session.channels += 1
        reason = "the relay was stopped"
        try:
            await stream.write(passage.greeting)
            inward = session.typed if passage.inputs else session.inward
            reason = await pump(stream, passage.machine, inward, session.outward)
        except OSError as error:
            reason = f"the client was lost: {error.strerror or error}"
        finally:
            passage.machine.close()
            tasks.discard(task)
            session.channels -= 1
            if passage.main:
                self._over(session, self._reasons.pop(session.lease, reason))

    def _over(self, session: Session, reason: str) -> None:
        """The main channel of a session has ended: so has the session."""
        if not self._routes.end(session):
            return
        self._mains.pop(session.lease, None)
        self._earlier.pop(session.lease, None)
        for task in self._channels.pop(session.lease, set()):
            task.cancel()
        self._emit(
            Ended(
                lease=session.lease,
                reason=reason,
                seconds=round(time.monotonic() - session.began, 3),
                bytes_in=session.bytes_in,
                bytes_out=session.outward.bytes,
            )
        )
        self._stop_when_drained()

    def _end(self, lease: str, reason: str) -> None:
        session = self._routes.session(lease)
        if session is None:
            self._withdraw(lease, reason)
        elif lease in self._mains:
            self._reasons[lease] = reason
            self._mains[lease].cancel()
        elif self._predecessor is not None:
            self._predecessor.write(End(lease=lease, reason=reason).line())

    # Offers

    def _offer(self, offer: Offer) -> None:
        self._stand(self._routes.add(offer))

    def _stand(self, standing: Standing) -> None:
        delay = standing.expires - time.monotonic()
        asyncio.get_running_loop().call_later(delay, self._lapse, standing)
        if standing.capabilities is None:
            self._start(self._ask_machine(standing))
        else:
            standing.known.set()

    async def _ask_machine(self, standing: Standing) -> None:
        lease = standing.offer.lease
        try:
            async with asyncio.timeout(self._limits.link_seconds):
                standing.capabilities = await machine_link.main_capabilities(standing.offer.socket)
        except MachineError as error:
            self.machine_failed(lease, error)
        except TimeoutError:
            self.machine_failed(lease, MachineError("the machine does not answer a link in time"))
        finally:
            standing.known.set()

    def _withdraw(self, lease: str, reason: str) -> None:
        if self._routes.withdraw(lease, reason):
            self._emit(Ended(lease=lease, reason=reason))

    def _lapse(self, standing: Standing) -> None:
        if self._routes.lapse(standing):
            self._emit(Ended(lease=standing.offer.lease, reason="it expired"))

    # The broker

    async def _attend(self, connection: socket.socket) -> None:
        """Serve one control connection."""
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=control.LINE_BYTES)
        broker = _Broker(writer)
        try:
            while line := await reader.readline():
                try:
                    command = control.command(line)
                    if not broker.listening and not isinstance(command, Replace):
                        self._subscribe(broker)
                    self._obey(command, broker)
                except VdibuildError as error:
                    broker.send(Error(message=error.message))
        except ValueError:
            _log.warning("a command is longer than %d bytes; its connection is closed", control.LINE_BYTES)
        except OSError as error:
            _log.info("a broker was lost: %s", error)
        finally:
            self._brokers.discard(broker)
            broker.gone = True
            broker.acknowledged.set()
            writer.close()

    def _subscribe(self, broker: _Broker) -> None:
        broker.listening = True
        self._brokers.add(broker)
        for event in self._events.kept():
            broker.send(event)

    def _obey(self, command: Command, broker: _Broker) -> None:
        match command:
            case Offer():
                self._offer(command)
            case Revoke():
                self._withdraw(command.lease, "it was revoked")
            case End():
                self._end(command.lease, command.reason)
            case GetState():
                broker.send(self._state())
            case Stop():
                self.stop()
            case Acknowledge():
                broker.acknowledged.set()
                self._events.acknowledge(command.number)
            case Replace():
                self._start(self._hand_over(broker))

    def _state(self) -> State:
        now = time.monotonic()
        return State(
            sessions=[
                SessionState(
                    lease=one.lease,
                    address=one.address,
                    seconds=round(now - one.began, 3),
                    bytes_in=one.bytes_in,
                    bytes_out=one.outward.bytes,
                    channels=one.channels,
                    # What an older relay carries is not seen here.
                    idle=None if one.lease in self._earlier else round(one.idle(now), 3),
                )
                for one in self._routes.sessions
            ],
            offers=[
                OfferState(
                    lease=one.offer.lease,
                    station=str(one.offer.station) if one.offer.station else None,
                    ticketed=one.offer.ticket is not None,
                    expires=round(one.expires - now, 3),
                )
                for one in self._routes.offers
            ],
        )

    def _emit(self, event: Event) -> None:
        numbered = self._events.add(event)
        _log_event(numbered)
        for broker in list(self._brokers):
            broker.send(numbered)

    def _refused(self, address: str, reason: str) -> None:
        if self._refusals.add(address, reason):
            asyncio.get_running_loop().call_later(_REFUSALS_SECONDS, self._report_refusals)

    def _report_refusals(self) -> None:
        for event in self._refusals.report():
            self._emit(event)

    # Replacement

    async def _hand_over(self, successor: _Broker) -> None:
        """Give everything to a successor, and serve on the channels that are open."""
        if self._draining:
            successor.send(Error(message="this relay has handed over already"))
            return
        self._draining = True
        self._stop_listening()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_SECONDS):
                await self._settled.wait()
        late = list(self._opening)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        try:
            estate = self._estate()
            handover.send(successor.descriptor, self._listeners, estate.line())
            successor.acknowledged.clear()
            successor.send(estate)
            # From here on it has to hear of every session that ends.
            self._brokers.add(successor)
            async with asyncio.timeout(_HANDOVER_SECONDS):
                await successor.acknowledged.wait()
            if successor.gone:
                raise ConnectionResetError("it went away")
        except (OSError, TimeoutError) as error:
            _log.error("the successor did not take over, this relay goes on: %s", error)
            self._brokers.discard(successor)
            self._draining = False
            self._listen()
            return
        for broker in self._brokers - {successor}:
            broker.close()
        self._brokers = {successor}
        for listener in self._listeners.values():
            listener.close()
        self._listeners = {}
        for standing in self._routes.offers:
            self._routes.withdraw(standing.offer.lease, "another relay has it")
        _log.info("handed over; %d sessions go on here", len(self._routes.sessions))
        self._stop_when_drained()

    def _estate(self) -> Estate:
        now = time.monotonic()
        return Estate(
            listeners=list(self._listeners),
            sessions=[
                control.HeirloomSession(
                    lease=one.lease,
                    identifier=one.identifier,
                    machine_identifier=one.machine_identifier,
                    socket=one.socket,
                    password=one.password,
                    ticket=one.ticket,
                    address=one.address,
                    seconds=now - one.began,
                    bytes_in=one.bytes_in,
                    bytes_out=one.outward.bytes,
                )
                for one in self._routes.sessions
            ],
            offers=[
                control.HeirloomOffer(
                    offer=one.offer.model_copy(update={"expires": max(one.expires - now, 0.001)}),
                    common=list(one.capabilities.common) if one.capabilities else [],
                    channel=list(one.capabilities.channel) if one.capabilities else [],
                )
                for one in self._routes.offers
            ],
            events=self._events.kept(),
            number=self._events.number,
        )

    async def _inherit(self, inherited: handover.Inheritance) -> None:
        estate = inherited.estate
        self._events.restore(list(estate.events), estate.number)
        for session in estate.sessions:
            self._earlier[session.lease] = (session.bytes_in, session.bytes_out)
            self._routes.inherit(
                Session(
                    lease=session.lease,
                    identifier=session.identifier,
                    machine_identifier=session.machine_identifier,
                    socket=session.socket,
                    password=session.password,
                    ticket=session.ticket,
                    address=session.address,
                    began=time.monotonic() - session.seconds,
                    inward=Counter(session.bytes_in),
                    outward=Counter(session.bytes_out),
                )
            )
        for heirloom in estate.offers:
            try:
                standing = self._routes.add(heirloom.offer)
            except VdibuildError as error:
                self._emit(Ended(lease=heirloom.offer.lease, reason=error.message))
                continue
            if heirloom.common:
                standing.capabilities = Capabilities(tuple(heirloom.common), tuple(heirloom.channel))
            self._stand(standing)
        reader, self._predecessor = await asyncio.open_unix_connection(sock=inherited.connection)
        self._predecessor.write(Acknowledge(number=estate.number).line())
        self._start(self._follow(reader))
        _log.info("took over from another relay: %d sessions go on there", len(estate.sessions))

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        """Hear of the ends of the sessions whose main channels the predecessor has."""
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                event = control.report(line)
                if isinstance(event, Ended):
                    self._inherited_over(event)
        for lease in list(self._earlier):
            self._inherited_over(Ended(lease=lease, reason="the relay that carried it is gone"))

    def _inherited_over(self, event: Ended) -> None:
        session = self._routes.session(event.lease)
        if session is None or event.lease not in self._earlier:
            return
        inward, outward = self._earlier[event.lease]
        session.inward.bytes += max(event.bytes_in - inward, 0)
        session.outward.bytes += max(event.bytes_out - outward, 0)
        self._over(session, event.reason)

    def _stop_when_drained(self) -> None:
        if self._draining and not self._listeners and not self._routes.sessions:
            self._stopped.set()

    # The end

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a fault in the relay", exc_info=error)

    async def _shut_down(self) -> None:
        self._stop_listening()
        for task in list(self._mains.values()):
            task.cancel()
        await asyncio.gather(*self._mains.values(), return_exceptions=True)
        for broker in list(self._brokers):
            await broker.finish()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._predecessor is not None:
            self._predecessor.close()
            with contextlib.suppress(OSError):
                await self._predecessor.wait_closed()
        if handover.CONTROL in self._listeners:
            with contextlib.suppress(OSError):  # it may be somebody else's, who made it for us
                self._control.unlink(missing_ok=True)
        for listener in self._listeners.values():
            listener.close()


class _Broker:
    """A control connection.

    listening: it gets events. acknowledged: set by each `ack`, and when the connection is gone.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.listening = False
        self.gone = False
        self.acknowledged = asyncio.Event()
        self._writer = writer

    @property
    def descriptor(self) -> int:
        """The connection's file descriptor."""
        return int(self._writer.get_extra_info("socket").fileno())

    def send(self, message: control.Report) -> None:
        """Send a message, now or later. One who does not read is let go: what is kept will come again."""
        if self._writer.is_closing():
            return
        self._writer.write(message.line())
        if self._writer.transport.get_write_buffer_size() > _UNREAD_BYTES and self.listening:
            _log.warning("a broker does not read its events; its connection is closed")
            self._writer.transport.abort()

    def close(self) -> None:
        """End the connection, when what was sent has been read."""
        self._writer.close()

    async def finish(self) -> None:
        """End the connection, and wait a moment until what was sent has been read."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_FINISH_SECONDS):
                await self._writer.wait_closed()


def _log_event(event: Event) -> None:
    match event:
        case Linked():
            _log.info("lease=%s linked from %s", event.lease, event.address)
        case Ended():
            _log.info(
                "lease=%s ended after %.0f s, %d bytes in, %d bytes out: %s",
                *(event.lease, event.seconds, event.bytes_in, event.bytes_out, event.reason),
            )
        case Refused():
            _log.warning("refused %s, %d times: %s", event.address, event.times, event.reason)
        case Error():
            _log.error("lease=%s %s", event.lease, event.message)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MILLISECONDS)


def _tls_context(listener: SecureListener) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A renegotiation would let a client turn a write into a read at any time.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(listener.certificate, listener.key)
    except OSError as error:
        raise HostError(
            f"the relay's certificate {listener.certificate} cannot be used: {error}",
            "`tls.certificate` and `tls.key` have to be PEM files that belong together",
        ) from None
    return context


def _listeners(config: Config, inherited: dict[str, socket.socket]) -> dict[str, socket.socket]:
    """The listening sockets, inherited where they still fit; those that do not are closed."""
    wanted = {handover.PLAIN: config.plain, handover.TLS: config.tls}
    with contextlib.ExitStack() as unused:
        for one in inherited.values():
            unused.callback(one.close)
        control_socket = inherited.get(handover.CONTROL) or _control(config.control)
        unused.callback(control_socket.close)
        listeners = {handover.CONTROL: control_socket}
        for name, listener in wanted.items():
            if listener is not None:
                kept = inherited.get(name)
                listeners[name] = kept if kept and _fits(kept, listener) else _bound(listener)
                unused.callback(listeners[name].close)
        unused.pop_all()
    for name, one in inherited.items():
        if listeners.get(name) is not one:
            one.close()
    return listeners


def _fits(bound: socket.socket, listener: Listener) -> bool:
    address, port, *_ = bound.getsockname()
    return address == str(listener.address) and listener.port in (0, port)


def _bound(listener: Listener) -> socket.socket:
    bound = socket.socket(socket.AF_INET if listener.address.version == 4 else socket.AF_INET6)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((str(listener.address), listener.port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise HostError(
            f"cannot listen on {listener.address} port {listener.port}: {error.strerror}",
            "the address has to be this host's, and the port free: `ss -ltnp` shows who has it",
        ) from None
    bound.setblocking(False)
    return bound


def _control(path: Path) -> socket.socket:
    """The control socket, for its owner only. What is there has been found dead."""
    bound = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise HostError(f"cannot make the control socket {path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    bound.listen(_BACKLOG)
    bound.setblocking(False)
    return bound


async def run(config: Config) -> None:
    """Run a relay in the place of one that is there, until it is told to stop. Raises HostError."""
    if config.tls:
        _tls_context(config.tls)  # what is wrong has to be found before the older relay hands over
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    given = service_manager.listening()
    relay = Relay(config, None if given else handover.take(config.control), given)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relay.stop)
    freeze()
    # Before the older relay hears that we took over: it may end at once, as the main process no more.
    service_manager.ready()
    await relay.serve()


def main(arguments: Sequence[str]) -> int:
    """Run the relay. arguments: the configuration file. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        if len(arguments) != 1:
            raise VdibuildError("usage: python -m vdibuild.pool.relay CONFIG")
        asyncio.run(run(load(Path(arguments[0]))))
    except VdibuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
