"""Brings stations and machines together: the line in which stations wait, and the offers made to them.

A station asks and waits in line; as soon as a machine is clean, the first in line is offered it, in the
database, to the relay and to the station, in this order. The offer ends in a link, which the relay reports,
or lapses; either way that machine is never offered again. How stations ask is no concern of this module: see
`signal_port` and `desk`.

Nothing here waits: every call is over before anything else happens, so that no two stations can be in the
middle of getting the same machine, and a kill finds the database before or after a step, never within.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from vdibuild.errors import VdibuildError
from vdibuild.pool.clones import Endpoint
from vdibuild.pool.leases import Leases, Machine, State

GRACE_SECONDS = 2.0
"""How much longer an offer lives here than at the relay, so that a link of the last moment counts."""

_OFFERS_AT_ONCE = 100  # so that those who wait longer hear from us in time
_RETURN_SECONDS = 60.0
"""How long a station that lost what it was offered may take to ask again, and be the next one."""

_FIRST_PENALTY_SECONDS = 10.0
_LONGEST_PENALTY_SECONDS = 300.0

_log = logging.getLogger(__name__)


class RelayAwayError(VdibuildError):
    """The relay cannot be reached just now."""


class FullError(VdibuildError):
    """As many stations wait as may: at this address, or in all."""


@dataclass(frozen=True)
class Station:
    """Someone who asks for a machine.

    name: the name that a token or certificate gives it, else its address. address: where it asks from.
    ticketed: its client gets a one-time password; otherwise the relay knows it by its address alone.
    """

    name: str
    address: str
    ticketed: bool = False


@dataclass(frozen=True)
class Limits:
    """What one pool allows. offer_seconds: how long an offer holds. waiting: how many stations may wait in
    all, waiting_per_address: how many at one address, offers included.
    """

    offer_seconds: float = 10.0
    waiting: int = 2000
    waiting_per_address: int = 8


class Relay(Protocol):
    """The way to the relay. Every call only hands a message on; messages arrive in the order of the calls."""

    @property
    def connected(self) -> bool:
        """Whether it is there, as far as is known."""

    def offer(
        self, lease: str, endpoint: Endpoint, station: str | None, ticket: str | None, seconds: float
    ) -> None:
        """Let a client in: one that comes from the address `station`, or knows the ticket, within that time.

        Raises RelayAwayError.
        """

    def revoke(self, lease: str) -> None:
        """Let nobody in any more for a lease; a session that has begun goes on. Raises RelayAwayError."""

    def end(self, lease: str, reason: str) -> None:
        """End a lease's session and offer, if there is one. Raises RelayAwayError."""


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass
class Offer:
    """A machine that was offered to a station.

    ticket: the one-time password, None for a client that knows none. expires: when it ends, by the event
    loop's clock. settled: done when it was linked or lapsed. linked: it was linked. held: someone is
    being told of it. hindered: nobody could link, for the relay was away.
    """

    machine: Machine
    station: Station
    ticket: str | None
    expires: float
    settled: asyncio.Future[None] = field(default_factory=_future)
    linked: bool = False
    held: bool = True
    hindered: bool = False


class Place:
    """A station's place in line; leave it when the station goes away."""

    def __init__(self, station: Station, broker: Broker) -> None:
        self.station = station
        self.offered: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
        self._broker = broker

    @property
    def position(self) -> int:
        """How many machines have to become clean until this station's; 0 when it has one."""
        return self._broker.position(self)

    def leave(self) -> None:
        """The station is not there any more. Its offer stays, for its client may be on the way."""
        self._broker.left(self)


class Broker:
    """The line and the offers of one pool.

    endpoints: where the machines that may be offered show their screens, by lease. changed: called when a
    machine was given out or has ended, and there is work to do.
    """

    def __init__(
        self,
        pool: str,
        leases: Leases,
        relay: Relay,
        endpoints: Mapping[str, Endpoint],
        limits: Limits,
        changed: Callable[[], None],
    ) -> None:
        self.pool = pool
        self.limits = limits
        self._leases = leases
        self._relay = relay
        self._endpoints = endpoints
        self._changed = changed
        self._line: dict[Place, int] = {}  # in order; the value is the position when it was last counted
        self._counted = True
        self._matching = False
        self._addresses: Counter[str] = Counter()
        self._offers: dict[str, Offer] = {}
        self._offered: dict[str, dict[str, Offer]] = {}  # the same, by the station's address first
        self._penalties: dict[str, _Penalty] = {}
        self._owed: dict[Station, float] = {}  # by the event loop's clock: until when

    @property
    def waiting(self) -> int:
        """How many stations are in line."""
        return len(self._line)

    def enter(self, station: Station) -> Place:
        """Put a station at the end of the line, unless an offer of its own waits for it; at the head of it,
        when the machine that it was offered was lost before anybody could link.

        Raises FullError.
        """
        place = Place(station, self)
        offers = self._offered.get(station.address, {})
        for offer in offers.values():
            # Whoever asks again, after a broken connection or a thousand times, gets what it has already.
            if offer.station == station and not offer.held and offer.expires > self._now():
                offer.held = True
                place.offered.set_result(offer)
                return place
        if self._addresses[station.address] + len(offers) >= self.limits.waiting_per_address:
            raise FullError(f"{self.limits.waiting_per_address} stations wait at {station.address} already")
        if len(self._line) >= self.limits.waiting:
            raise FullError(f"{self.limits.waiting} stations wait already")
        if self._owed.pop(station, 0.0) > self._now():
            self._line = {place: 1, **self._line}
            self._counted = False
        else:
            self._line[place] = len(self._line) + 1
        self._addresses[station.address] += 1
        if not self._matching:
            # Once for all who come at the same moment: a transaction costs more than an offer.
            self.match_soon()
        return place

    def position(self, place: Place) -> int:
        """A place's position in line, from 1; 0 when it is not in line any more."""
        if not self._counted:
            self._line = {other: number for number, other in enumerate(self._line, 1)}
            self._counted = True
        return self._line.get(place, 0)

    def left(self, place: Place) -> None:
        """See Place.leave."""
        if place in self._line:
            self._remove(place)
        elif place.offered.done() and not place.offered.cancelled():
            place.offered.result().held = False

    def match(self) -> None:
        """Offer clean machines to the first who wait, as far as there are any."""
        self._matching = False
        if not self._relay.connected:
            return
        welcome = (place for place in self._line if not self._penalised(place.station))
        places = list(islice(welcome, _OFFERS_AT_ONCE))
        machines = self._leases.offer(self.pool, [place.station.name for place in places]) if places else []
        for machine, place in zip(machines, places, strict=False):
            self._offer(machine, place)
        if len(machines) == _OFFERS_AT_ONCE:
            self.match_soon()

    def match_soon(self) -> None:
        """Do so as soon as all is done that is under way; those for whom it fails stay in line."""

        def match() -> None:
            try:
                self.match()
            except VdibuildError as error:
                _log.error("pool %s: %s", self.pool, error)

        self._matching = True
        asyncio.get_running_loop().call_soon(match)

    def linked(self, lease: str, address: str) -> None:
        """The relay let a client in."""
        if not self._leases.link(lease, address):
            if self._leases.in_use(lease):
                return  # we were told before
            # It came too late: what ended stays ended.
            self._quietly(lambda: self._relay.end(lease, "this lease is over"))
            return
        _log.info("lease %s: linked from %s", lease, address)
        offer = self._forget(lease)
        if offer:
            self._penalties.pop(offer.station.address, None)
            offer.linked = True
            offer.settled.set_result(None)

    def ended(self, lease: str, reason: str, bytes_in: int, bytes_out: int) -> None:
        """The relay ended a session, or an offer."""
        offer = self._offers.get(lease)
        if offer and offer.expires <= self._now():
            self._penalise(offer)  # the relay's clock for it began a moment after ours
        self._leases.traffic(lease, bytes_in, bytes_out)
        self.end(lease, reason)

    def end(self, lease: str, reason: str) -> None:
        """End a lease in whatever state it is."""
        if self._leases.end(lease, reason):
            _log.info("lease %s: over: %s", lease, reason)
        offer = self._offers.get(lease)
        if offer and offer.expires > self._now():
            self._owed[offer.station] = self._now() + _RETURN_SECONDS
        self._settle(lease)
        self._changed()

    def lapse(self) -> None:
        """End the offers whose time is over, and forgive stations whose last one is long past."""
        if not self._relay.connected:
            for offer in self._offers.values():
                offer.hindered = True
            return  # a link may be what it cannot tell us
        for address, penalty in list(self._penalties.items()):
            if penalty.until + _LONGEST_PENALTY_SECONDS < self._now():
                del self._penalties[address]
        self._owed = {station: until for station, until in self._owed.items() if until > self._now()}
        for lease, offer in list(self._offers.items()):
            if offer.expires + GRACE_SECONDS <= self._now():
                self._lapse(lease, "the station did not connect")
                self._penalise(offer)

    def _offer(self, machine: Machine, place: Place) -> None:
        station = place.station
        ticket = secrets.token_urlsafe(24) if station.ticketed else None
        address = None if station.ticketed else station.address
        seconds = self.limits.offer_seconds
        offer = Offer(machine, station, ticket, self._now() + seconds)
        try:
            self._relay.offer(machine.lease, self._endpoints[machine.lease], address, ticket, seconds)
        except (RelayAwayError, KeyError) as error:
            # It may have heard of it all the same: that machine is lost, but the station waits on.
            self.end(machine.lease, f"it could not be offered: {error}")
            return
        _log.info("lease %s: %s offered to %s", machine.lease, machine.name, station.name)
        self._offers[machine.lease] = offer
        self._offered.setdefault(station.address, {})[machine.lease] = offer
        self._remove(place)
        place.offered.set_result(offer)
        self._changed()

    def _lapse(self, lease: str, reason: str) -> None:
        if self._leases.end(lease, reason, (State.OFFERED,)):
            _log.info("lease %s: lapsed: %s", lease, reason)
            self._quietly(lambda: self._relay.revoke(lease))
        self._settle(lease)
        self._changed()

    def _settle(self, lease: str) -> None:
        offer = self._forget(lease)
        if offer:
            offer.settled.set_result(None)

    def _forget(self, lease: str) -> Offer | None:
        offer = self._offers.pop(lease, None)
        if offer:
            here = self._offered[offer.station.address]
            del here[lease]
            if not here:
                del self._offered[offer.station.address]
        return offer

    def _remove(self, place: Place) -> None:
        del self._line[place]
        self._counted = False
        self._addresses[place.station.address] -= 1
        if not self._addresses[place.station.address]:
            del self._addresses[place.station.address]

    def _penalise(self, offer: Offer) -> None:
        # Its client never comes: it must not use up the pool, one machine after the other.
        if offer.hindered:
            return
        station = offer.station
        before = self._penalties.get(station.address)
        seconds = min(before.seconds * 2 if before else _FIRST_PENALTY_SECONDS, _LONGEST_PENALTY_SECONDS)
        self._penalties[station.address] = _Penalty(seconds, self._now() + seconds)

    def _penalised(self, station: Station) -> bool:
        penalty = self._penalties.get(station.address)
        return penalty is not None and penalty.until > self._now()

    def _quietly(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except RelayAwayError as error:
            # When it is there again, its state is compared with ours.
            _log.warning("%s", error)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class _Penalty:
    """How long a station whose offers lapsed has to wait. until: by the event loop's clock."""

    seconds: float
    until: float
