"""Rules of offers and sessions that hold in every order of links, ends and times."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from vdibuild.errors import VdibuildError
from vdibuild.pool.control import Offer
from vdibuild.pool.routes import RefusedError, Routes, Session, Standing, plain_address

ADDRESSES = ["10.0.0.1", "10.0.0.2", "fd00::3"]
MOST = 6


def offer(number: int, station: str | None, ticketed: bool, seconds: float = 10) -> Offer:
    return Offer(
        lease=f"lease-{number}",
        socket=Path(f"/run/{number}"),
        password=f"real-{number}",
        station=ip_address(station) if station else None,
        ticket=f"ticket-{number}" if ticketed or not station else None,
        expires=seconds,
    )


class RoutesMachine(RuleBasedStateMachine):
    """Any interleaving: a client between its ticket and its link is in `taking`."""

    taking = Bundle("taking")
    living = Bundle("living")
    passwords = Bundle("passwords")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.routes = Routes(lambda: self.now, MOST)
        self.offers: dict[str, Offer] = {}
        self.linked: set[str] = set()
        self.over: set[str] = set()
        self.made = 0

    def lease_is_over(self, lease: str) -> None:
        assert lease not in self.over, "a lease that ends twice"
        self.over.add(lease)

    @rule(target=passwords, station=st.sampled_from([*ADDRESSES, None]), ticketed=st.booleans())
    def make_offer(self, station: str | None, ticketed: bool) -> str:
        self.made += 1
        made = offer(self.made, station, ticketed)
        try:
            self.routes.add(made)
        except VdibuildError:
            assert len(self.routes.offers) == MOST
        else:
            self.offers[made.lease] = made
        return made.ticket or ""

    @rule(
        target=taking,
        address=st.sampled_from(ADDRESSES),
        secure=st.booleans(),
        password=st.one_of(passwords, st.just("")),
    )
    def show_ticket(self, address: str, secure: bool, password: str) -> object:
        try:
            standing = self.routes.take(self.routes.candidates(address, secure), address, password.encode())
        except RefusedError:
            return multiple()
        taken = standing.offer
        assert taken.lease not in self.linked | self.over
        assert (taken.ticket or "") == password
        assert secure or taken.ticket is None
        assert taken.station is None or str(taken.station) == address
        assert standing.expires > self.now
        return (standing, address)

    @rule(target=living, client=consumes(taking))
    def let_in(self, client: tuple[Standing, str]) -> object:
        standing, address = client
        lease = standing.offer.lease
        try:
            # Every machine draws the same id.
            session = self.routes.link(standing, address, 4711)
        except RefusedError:
            assert standing.withdrawn
            assert not self.routes.give_back(standing)
            self.lease_is_over(lease)
            return multiple()
        assert lease not in self.linked | self.over, "a machine that was used before"
        self.linked.add(lease)
        return session

    @rule(client=consumes(taking))
    def lose_client(self, client: tuple[Standing, str]) -> None:
        standing, _ = client
        if not self.routes.give_back(standing):
            self.lease_is_over(standing.offer.lease)

    @rule(session=living, address=st.sampled_from(ADDRESSES), secure=st.booleans())
    def add_channel(self, session: Session, address: str, secure: bool) -> None:
        try:
            found = self.routes.find(session.identifier, address, secure)
        except RefusedError:
            wrong = address != session.address if session.ticket is None else not secure
            assert wrong or session.lease in self.over
            return
        assert found is session and session.lease not in self.over
        assert found.admits((session.ticket or "").encode()) and not found.admits(b"guessed")

    @rule(session=living)
    def end(self, session: Session) -> None:
        if self.routes.end(session):
            self.lease_is_over(session.lease)

    @rule(number=st.integers(1, 20))
    def withdraw(self, number: int) -> None:
        if self.routes.withdraw(f"lease-{number}", "revoked"):
            self.lease_is_over(f"lease-{number}")

    @rule(seconds=st.floats(0, 8))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for standing in self.routes.offers:
            if standing.expires <= self.now and self.routes.lapse(standing):
                self.lease_is_over(standing.offer.lease)

    @invariant()
    def every_lease_is_in_one_place(self) -> None:
        standing = {one.offer.lease for one in self.routes.offers}
        living = {one.lease for one in self.routes.sessions}
        assert not standing & living and not (standing | living) & self.over
        assert standing | living | self.over == set(self.offers)
        assert living == self.linked - self.over

    @invariant()
    def identifiers_are_unlike(self) -> None:
        identifiers = [one.identifier for one in self.routes.sessions]
        assert len(set(identifiers)) == len(identifiers) and 0 not in identifiers


TestRoutes = RoutesMachine.TestCase


def test_the_oldest_offer_goes_first() -> None:
    routes = Routes(lambda: 0.0, MOST)
    for number in (1, 2):
        routes.add(offer(number, ADDRESSES[0], ticketed=False))
    taken = [
        routes.take(routes.candidates(ADDRESSES[0], False), ADDRESSES[0], b"").offer.lease for _ in range(2)
    ]
    assert taken == ["lease-1", "lease-2"]


@pytest.mark.parametrize(
    ("given", "plain"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "fe80::1"), ("FD00::3", "fd00::3"), ("10.0.0.1",) * 2],
)
def test_one_form_of_an_address(given: str, plain: str) -> None:
    assert plain_address(given) == plain
