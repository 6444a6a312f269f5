"""The broker's end of the way to the relay, over a connection that may break and is made again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from vdibuild.errors import VdibuildError
from vdibuild.pool import control
from vdibuild.pool.broker import RelayAwayError
from vdibuild.pool.clones import Endpoint

AGAIN_SECONDS = 0.5
"""How long to wait before the relay is looked for again."""

STATE_SECONDS = 15.0
"""How often the relay is asked for its state when nothing is amiss."""

SOON_SECONDS = 1.0
"""How often it is asked while something of ours is missing there."""

_LINE_BYTES = 1 << 26  # a state names every session and offer
_UNREAD_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told what the relay tells."""

    def linked(self, lease: str, address: str) -> None:
        """A client was let in."""

    def ended(self, lease: str, reason: str, bytes_in: int, bytes_out: int) -> None:
        """A lease's session, or offer, is over."""

    def refused(self, address: str, reason: str, times: int) -> None:
        """Links were refused."""

    def machine_failed(self, lease: str, message: str) -> None:
        """A machine does not answer the relay."""

    def idle(self, seconds: dict[str, float]) -> None:
        """For how long nobody has used a session, by lease, where that is known."""

    def relay_state(self, sessions: dict[str, str], offers: set[str]) -> bool:
        """What the relay has: sessions with their clients' addresses, and offers, by lease. Returns whether
        it should soon be asked again.
        """


class RelayLink:
    """The way to the relay at a control socket; see `running`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._heard = False

    @property
    def connected(self) -> bool:
        """Whether the relay is there, and has told what it has since it came."""
        return self._heard

    @contextlib.asynccontextmanager
    async def running(self, listener: Listener) -> AsyncIterator[None]:
        """Keep connected for as long as the block runs."""
        task = asyncio.create_task(self._keep(listener))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def offer(
        self, lease: str, endpoint: Endpoint, station: str | None, ticket: str | None, seconds: float
    ) -> None:
        """See broker.Relay."""
        self._send(
            control.Offer.model_validate(
                {
                    "lease": lease,
                    "socket": endpoint.socket,
                    "password": endpoint.password,
                    "station": station,
                    "ticket": ticket,
                    "expires": seconds,
                }
            )
        )

    def revoke(self, lease: str) -> None:
        """See broker.Relay."""
        self._send(control.Revoke(lease=lease))

    def end(self, lease: str, reason: str) -> None:
        """See broker.Relay."""
        self._send(control.End(lease=lease, reason=reason[:200]))

    def _send(self, message: control.Command) -> None:
        if self._writer is None or self._writer.transport.is_closing():
            raise RelayAwayError(f"the relay is not at {self._path}", "see relay.log in the pool's directory")
        self._writer.write(message.line())
        if self._writer.transport.get_write_buffer_size() > _UNREAD_BYTES:
            # It hangs: what waits would reach it when nobody wants it any more.
            self._writer.transport.abort()

    async def _keep(self, listener: Listener) -> None:
        away = False
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path), limit=_LINE_BYTES)
            except OSError as error:
                if not away:
                    _log.error("the relay is not at %s: %s", self._path, error.strerror)
                away = True
            else:
                away = False
                try:
                    await self._attend(reader, writer, listener)
                except (OSError, ValueError, VdibuildError) as error:
                    # Also where what it told could not be noted: it tells again what nobody acknowledged.
                    _log.error("the relay was lost: %s", error)
                finally:
                    self._heard = False
                    self._writer = None
                    writer.close()
            await asyncio.sleep(AGAIN_SECONDS)

    async def _attend(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener: Listener
    ) -> None:
        self._writer = writer
        loop = asyncio.get_running_loop()
        self._send(control.GetState())
        due: asyncio.TimerHandle | None = None
        try:
            # The events that nobody acknowledged come before the answer.
            while line := await reader.readline():
                report = control.report(line)
                if isinstance(report, control.State):
                    self._heard = True
                    sessions = {session.lease: session.address for session in report.sessions}
                    listener.idle({one.lease: one.idle for one in report.sessions if one.idle is not None})
                    soon = listener.relay_state(sessions, {offer.lease for offer in report.offers})
                    due = loop.call_later(SOON_SECONDS if soon else STATE_SECONDS, self._ask)
                elif not isinstance(report, control.Estate):
                    self._tell(report, listener)
                    if report.number:
                        self._send(control.Acknowledge(number=report.number))
        finally:
            if due:
                due.cancel()

    def _ask(self) -> None:
        with contextlib.suppress(RelayAwayError):
            self._send(control.GetState())

    def _tell(self, event: control.Event, listener: Listener) -> None:
        match event:
            case control.Linked():
                listener.linked(event.lease, event.address)
            case control.Ended():
                listener.ended(event.lease, event.reason, event.bytes_in, event.bytes_out)
            case control.Refused():
                listener.refused(event.address, event.reason, event.times)
            case control.Error():
                if event.lease is None:
                    _log.error("the relay: %s", event.message)
                else:
                    listener.machine_failed(event.lease, event.message)
