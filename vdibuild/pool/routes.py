"""Who may link to which machine: the offers nobody has taken yet, and the sessions that have begun.

Nothing here waits or does input and output; times are given by a clock that can be any.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from vdibuild.errors import VdibuildError
from vdibuild.pool.control import Offer
from vdibuild.pool.spice import Capabilities, LinkError
from vdibuild.pool.stream import Counter


class RefusedError(VdibuildError):
    """A client is not let in. code: what it is told."""

    def __init__(self, message: str, code: LinkError = LinkError.PERMISSION_DENIED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class Standing:
    """An offer that stands.

    expires: by the clock. known: the machine was asked for its capabilities on the main channel;
    capabilities: what it said, None if it did not answer. taken: a client is being let in. withdrawn: why
    nobody may come in any more.
    """

    offer: Offer
    expires: float
    known: asyncio.Event = field(default_factory=asyncio.Event)
    capabilities: Capabilities | None = None
    taken: bool = False
    withdrawn: str = ""


@dataclass(eq=False)
class Session:
    """A client at a machine.

    identifier: the id its client knows it by, unlike any other's; machine_identifier: the machine's own.
    began: by the clock. channels: how many it has. inward, outward: bytes to and from the machine. typed: of
    the bytes to the machine those of its keyboard and mouse, which inward does not count.
    """

    lease: str
    identifier: int
    machine_identifier: int
    socket: Path
    password: str
    ticket: str | None
    address: str
    began: float
    channels: int = 0
    inward: Counter = field(default_factory=Counter)
    outward: Counter = field(default_factory=Counter)
    typed: Counter = field(default_factory=Counter)
    _seen: tuple[int, float] | None = None

    @property
    def bytes_in(self) -> int:
        """Bytes to the machine."""
        return self.inward.bytes + self.typed.bytes

    def idle(self, now: float) -> float:
        """For how many seconds nobody has typed or moved the mouse, as was seen whenever this was asked."""
        if self._seen is None or self._seen[0] != self.typed.bytes:
            self._seen = self.typed.bytes, now
        return now - self._seen[1]

    def admits(self, password: bytes) -> bool:
        """Whether a further channel's password is the one the session began with."""
        return hmac.compare_digest(password, (self.ticket or "").encode())


class Routes:
    """The offers and sessions of a relay. clock: seconds. limit: how many offers may stand."""

    def __init__(self, clock: Callable[[], float], limit: int) -> None:
        self._clock = clock
        self._limit = limit
        self._offers: dict[str, Standing] = {}
        self._sessions: dict[int, Session] = {}
        self._by_lease: dict[str, Session] = {}

    @property
    def offers(self) -> list[Standing]:
        """The offers that stand, oldest first."""
        return list(self._offers.values())

    @property
    def sessions(self) -> list[Session]:
        """The sessions that live, oldest first."""
        return list(self._sessions.values())

    def add(self, offer: Offer) -> Standing:
        """Make an offer stand. Raises VdibuildError for a lease that is known, or when there are too many."""
        if offer.lease in self._offers or offer.lease in self._by_lease:
            raise VdibuildError(f"lease {offer.lease} was offered before")
        if len(self._offers) >= self._limit:
            raise VdibuildError(f"{self._limit} offers stand already")
        standing = Standing(offer, self._clock() + offer.expires)
        self._offers[offer.lease] = standing
        return standing

    def candidates(self, address: str, secure: bool) -> list[Standing]:
        """The offers that a first link from this address may be meant for.

        secure: it came over TLS. Raises RefusedError when there are none.
        """
        near = [one for one in self._offers.values() if self._open(one, address)]
        found = [one for one in near if secure or one.offer.ticket is None]
        if near and not found:
            raise RefusedError("a ticket without TLS", LinkError.NEED_SECURED)
        if not found:
            raise RefusedError("nothing is offered to this address")
        return found

    def take(self, candidates: Iterable[Standing], address: str, password: bytes) -> Standing:
        """Choose the offer that a client's password is for, and keep it from all others.

        An empty password is that of an old client, which is known by its address. Raises RefusedError.
        """
        # Comparing digests, a stranger learns nothing from how long it takes.
        wanted = hashlib.sha256(password).digest()
        for one in candidates:
            expected = hashlib.sha256((one.offer.ticket or "").encode()).digest()
            if expected == wanted and self._open(one, address):
                one.taken = True
                return one
        raise RefusedError("a wrong, late or used ticket" if password else "a link without a ticket")

    def give_back(self, standing: Standing) -> bool:
        """The client was not let in after all. Returns whether the offer stands for others."""
        standing.taken = False
        if not standing.withdrawn and standing.expires > self._clock():
            return True
        self._offers.pop(standing.offer.lease, None)
        return False

    def link(self, standing: Standing, address: str, machine_identifier: int) -> Session:
        """The client of a taken offer is in. Raises RefusedError when it was withdrawn meanwhile."""
        if standing.withdrawn:
            raise RefusedError(f"the offer is over: {standing.withdrawn}")
        offer = standing.offer
        session = Session(
            lease=offer.lease,
            identifier=self._unused(),
            machine_identifier=machine_identifier,
            socket=offer.socket,
            password=offer.password,
            ticket=offer.ticket,
            address=address,
            began=self._clock(),
        )
        del self._offers[offer.lease]
        self.inherit(session)
        return session

    def inherit(self, session: Session) -> None:
        """A session that began elsewhere."""
        self._sessions[session.identifier] = session
        self._by_lease[session.lease] = session

    def session(self, lease: str) -> Session | None:
        """The lease's session, if it lives."""
        return self._by_lease.get(lease)

    def find(self, identifier: int, address: str, secure: bool) -> Session:
        """The session a further channel is for. secure: it came over TLS. Raises RefusedError."""
        session = self._sessions.get(identifier)
        # An old client has no ticket to show; that it comes from where the first link came has to do.
        if session is None or (session.ticket is None and session.address != address):
            raise RefusedError("an unknown session", LinkError.BAD_CONNECTION_ID)
        if session.ticket is not None and not secure:
            raise RefusedError("a ticket without TLS", LinkError.NEED_SECURED)
        return session

    def end(self, session: Session) -> bool:
        """A session is over. Returns False when it was already."""
        self._by_lease.pop(session.lease, None)
        return self._sessions.pop(session.identifier, None) is not None

    def withdraw(self, lease: str, reason: str) -> bool:
        """Let nobody in any more. Returns whether the offer is gone by that.

        Otherwise there is none, or a client is just being let in; the latter is refused at the last moment.
        """
        standing = self._offers.get(lease)
        if standing is None:
            return False
        standing.withdrawn = reason
        if standing.taken:
            return False
        del self._offers[lease]
        return True

    def lapse(self, standing: Standing) -> bool:
        """An offer's time is over. Returns whether it is gone; not when it is, or was, being taken."""
        if standing.taken or self._offers.get(standing.offer.lease) is not standing:
            return False
        standing.withdrawn = "it expired"
        del self._offers[standing.offer.lease]
        return True

    def _open(self, standing: Standing, address: str) -> bool:
        station = standing.offer.station
        return (
            not standing.taken
            and not standing.withdrawn
            and standing.expires > self._clock()
            and (station is None or plain_address(str(station)) == address)
        )

    def _unused(self) -> int:
        # Machines do not draw theirs so that a stranger could not guess them, nor unlike each other's.
        while True:
            identifier = secrets.randbelow((1 << 32) - 1) + 1
            if identifier not in self._sessions:
                return identifier


def plain_address(address: str) -> str:
    """An address in the one form it is compared in: no scope, and IPv4 as IPv4."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(parsed)
