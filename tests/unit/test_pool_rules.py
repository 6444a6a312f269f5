"""The rules of the pool, for all interleavings: the real leases, broker and service over a made-up world.

The world, which is the hypervisor's machines and the relay's sessions, lives on when the service is killed.
Time is made up as well (see VirtualLoop), and the service can be killed between any two steps of its loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.virtual import VirtualLoop
from vdibuild.errors import HostError, VerificationError
from vdibuild.pool.broker import FullError, Limits, Place, RelayAwayError, Station
from vdibuild.pool.clones import Endpoint, Found
from vdibuild.pool.leases import UNUSED, Leases, Machine, Mode, State
from vdibuild.pool.service import Service, Wishes

POOL, IMAGE = "desktop", "debian-13"
CLEAN, MAXIMUM = 2, 5
VERSIONS = ["20260101.1", "20260102.1", "20260103.1"]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SESSION_SECONDS = 400.0
SETTLE_SECONDS = 120.0
OFFER_SECONDS = 60.0
ORDERS = ["promote", "pause", "drain", "serve", "resize"]
ORDERS_OF_ONE = ["pause", "pause", "resume", "drain", "destroy"]


@dataclass
class World:
    """What goes on without the service. broken: versions whose clones never answer."""

    domains: dict[str, str] = field(default_factory=dict)  # by lease: made, running, ended
    foreign: Set[str] = frozenset({"someone-elses"})
    offers: dict[str, float] = field(default_factory=dict)  # by lease: when they end
    sessions: dict[str, str] = field(default_factory=dict)  # by lease: from where
    events: list[tuple[str, str]] = field(default_factory=list)
    ever_offered: Counter[str] = field(default_factory=Counter)
    ever_linked: Counter[str] = field(default_factory=Counter)
    ever_clean: set[str] = field(default_factory=set)
    paused: set[str] = field(default_factory=set)
    promoted: str = VERSIONS[0]
    broken: set[str] = field(default_factory=set)
    down: bool = False
    full: bool = False
    database_full: bool = False
    relay_away: bool = False
    wrong: list[str] = field(default_factory=list)
    now: float = 0.0

    def expire(self) -> None:
        for lease in [lease for lease, end in self.offers.items() if end <= self.now]:
            del self.offers[lease]
            self.events.append(("ended", lease))


class Watch(logging.Handler):
    """Sees defects that the service met, logged, and went on after."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.world.wrong.append(str(record.exc_info[1]))


class Dead(BaseException):
    """A killed process did something."""


@dataclass
class Life:
    """One process of the service. over: it was killed."""

    over: bool = False

    def check(self) -> None:
        if self.over:
            raise Dead


class FakeCloner:
    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life

    async def _pass(self, seconds: float) -> None:
        self.life.check()
        await asyncio.sleep(seconds)
        self.life.check()
        if self.world.down:
            raise HostError("the hypervisor is away")

    async def promoted(self) -> str:
        await self._pass(0)
        return self.world.promoted

    async def keep(self, versions: Set[str]) -> None:
        await self._pass(0)

    async def room(self) -> int:
        await self._pass(0)
        return 0 if self.world.full else 100

    async def make(self, machine: Machine) -> Endpoint:
        await self._pass(0.1)
        if machine.lease in self.world.domains:
            self.world.wrong.append(f"{machine.lease} was made twice")
        self.world.domains[machine.lease] = "made"
        return await self.finish(machine)

    async def finish(self, machine: Machine) -> Endpoint:
        await self._pass(20)
        if self.world.domains.get(machine.lease) != "made" or machine.version in self.world.broken:
            raise VerificationError("it does not answer")
        self.world.domains[machine.lease] = "running"
        await self._pass(0.01)
        self.world.ever_clean.add(machine.lease)
        return Endpoint(Path("/nowhere"), "secret")

    async def destroy(self, lease: str) -> None:
        await self._pass(0.1)
        self.world.domains.pop(lease, None)
        if self.world.sessions.pop(lease, None):
            self.world.events.append(("ended", lease))
        await self._pass(0.1)

    async def found(self) -> dict[str, Found]:
        await self._pass(0.05)
        endpoint = Endpoint(Path("/nowhere"), "secret")
        result = {
            lease: Found(None if state == "ended" else endpoint)
            for lease, state in self.world.domains.items()
        }
        await self._pass(0.05)
        return result

    async def tell(self, lease: str, text: str) -> None:
        await self._pass(0.1)


class FakeRelay:
    """The service's way to the relay of the world."""

    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life
        self.connected = False

    def offer(
        self, lease: str, endpoint: Endpoint, station: str | None, ticket: str | None, seconds: float
    ) -> None:
        self._say()
        # What every rule comes to: whoever gets a machine gets one that is clean, and gets it alone.
        if lease not in self.world.ever_clean:
            self.world.wrong.append(f"{lease} was offered before it was clean")
        if lease in self.world.paused:
            self.world.wrong.append(f"{lease} was offered while it was paused")
        self.world.ever_offered[lease] += 1
        self.world.offers[lease] = self.world.now + seconds

    def revoke(self, lease: str) -> None:
        self._say()
        if self.world.offers.pop(lease, None):
            self.world.events.append(("ended", lease))

    def end(self, lease: str, reason: str) -> None:
        self._say()
        if self.world.offers.pop(lease, None) or self.world.sessions.pop(lease, None):
            self.world.events.append(("ended", lease))

    def _say(self) -> None:
        self.life.check()
        if not self.connected:
            raise RelayAwayError("the relay is away")


class MortalLeases(Leases):
    """Leases that a killed process cannot change any more, and nobody while their disk is full."""

    def __init__(self, url: str, clock: Callable[[], datetime], world: World, life: Life) -> None:
        self.world = world
        self.life = life
        super().__init__(url, clock)

    @contextlib.contextmanager
    def _transaction(self, engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
        self.life.check()
        with super()._transaction(engine) as connection:
            yield connection
            if self.world.database_full and connection.get_execution_options().get("writes"):
                raise HostError("the disk is full")


class PoolRules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.world = World()
        self.places: list[Place] = []
        self.alive = False
        self.kills = 0
        self.watch = Watch(self.world)
        logging.getLogger("vdibuild.pool").addHandler(self.watch)
        self.observer = Leases(self._url(), self._clock)

    def _url(self) -> str:
        return f"sqlite:///{self.directory.name}/leases.db"

    def _clock(self) -> datetime:
        return EPOCH + timedelta(seconds=self.world.now)

    # The service's process

    @initialize()
    def begin(self) -> None:
        self._start()
        self.let_time_pass(60.0)

    @precondition(lambda self: not self.alive)
    @rule()
    def restart(self) -> None:
        self._start()

    def _start(self) -> None:
        self.loop = VirtualLoop(self.world.now)
        self.loop.set_exception_handler(lambda _, context: self.world.wrong.append(str(context)))
        self.life = Life()
        self.leases = MortalLeases(self._url(), self._clock, self.world, self.life)
        self.relay = FakeRelay(self.world, self.life)
        wishes = Wishes(IMAGE, lambda _: CLEAN, MAXIMUM, timedelta(seconds=SESSION_SECONDS))
        self.places = []
        self.alive = True
        ready = self.loop.create_future()

        async def serve() -> None:
            cloner = FakeCloner(self.world, self.life)
            while True:
                self.service = Service(
                    POOL,
                    wishes,
                    self.leases,
                    cloner,
                    self.relay,
                    Limits(OFFER_SECONDS),
                    lambda: self._clock(),
                )
                try:
                    async with self.service.running():
                        ready.set_result(None)
                        await asyncio.Event().wait()
                except HostError:
                    await asyncio.sleep(1)  # as a service manager does

        async def listen() -> None:
            await ready
            while True:
                self._hear()
                await asyncio.sleep(0.9)

        self.ready = ready
        self.tasks = [self.loop.create_task(serve()), self.loop.create_task(listen())]

    def _hear(self) -> None:
        """What the way to the relay does: the events that nobody acknowledged, then the state."""
        self.world.expire()
        self.relay.connected = not self.world.relay_away
        if not self.relay.connected:
            return
        try:
            while self.world.events:
                happened, lease = self.world.events[0]
                if happened == "linked":
                    self.service.broker.linked(lease, "10.0.0.1")
                else:
                    self.service.broker.ended(lease, "it ended", 1, 2)
                del self.world.events[0]
            self.service.relay_state(dict(self.world.sessions), set(self.world.offers))
        except HostError:
            self.relay.connected = False  # it begins anew

    @precondition(lambda self: self.alive)
    @rule()
    def kill(self) -> None:
        self.life.over = True
        self.loop.kill()
        self.leases.close()
        self.alive = False
        self.kills += 1

    @precondition(lambda self: self.alive)
    @rule(steps=some.integers(1, 60))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.loop.step()
            self.world.now = self.loop.time()
            self.check()

    @precondition(lambda self: self.alive)
    @rule(steps=some.integers(1, 60))
    def go_on_and_be_killed(self, steps: int) -> None:
        self.go_on(steps)
        self.kill()

    @precondition(lambda self: self.alive)
    @rule(seconds=some.sampled_from([1.0, 30.0, 100.0]))
    def let_time_pass(self, seconds: float) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self.go_on(1)

    # Stations

    def _serving(self) -> bool:
        return self.alive and self.ready.done()

    @precondition(_serving)
    @rule(address=some.integers(1, 3))
    def ask(self, address: int) -> None:
        station = Station(f"10.0.0.{address}", f"10.0.0.{address}")

        async def enter() -> None:
            with contextlib.suppress(FullError):
                self.places.append(self.service.broker.enter(station))

        self.loop.run_until_complete(enter())

    @precondition(_serving)
    @rule(address=some.integers(1, 3), data=some.data(), steps=some.integers(0, 20))
    def sit_down(self, address: int, data: some.DataObject, steps: int) -> None:
        self.ask(address)
        self.go_on(steps)
        if self.world.offers:
            self.link(data)

    @precondition(lambda self: self._serving() and self.places)
    @rule(data=some.data())
    def leave(self, data: some.DataObject) -> None:
        self.places.pop(data.draw(some.integers(0, len(self.places) - 1))).leave()

    @precondition(lambda self: self.world.offers)
    @rule(data=some.data())
    def link(self, data: some.DataObject) -> None:
        self.world.expire()
        if not self.world.offers:
            return
        lease = _one_of(self.world.offers, data)
        del self.world.offers[lease]
        if self.world.domains.get(lease) == "running":
            self.world.ever_linked[lease] += 1
            self.world.sessions[lease] = "10.0.0.1"
            self.world.events.append(("linked", lease))
        else:
            self.world.events.append(("ended", lease))

    @precondition(lambda self: self.world.sessions)
    @rule(data=some.data())
    def end_session(self, data: some.DataObject) -> None:
        lease = _one_of(self.world.sessions, data)
        del self.world.sessions[lease]
        self.world.events.append(("ended", lease))

    # Misfortune

    @rule(
        kind=some.sampled_from(["relay away", "hypervisor away", "full", "database full", "broken version"])
    )
    def begin_misfortune(self, kind: str) -> None:
        match kind:
            case "relay away":
                self.world.relay_away = True
            case "hypervisor away":
                self.world.down = True
            case "full":
                self.world.full = True
            case "database full":
                self.world.database_full = True
            case _:
                self.world.promoted = VERSIONS[-1]
                self.world.broken = {VERSIONS[-1]}

    @precondition(lambda self: self.world.offers or self.world.sessions)
    @rule()
    def kill_relay(self) -> None:
        self.world.offers.clear()
        self.world.sessions.clear()
        self.world.events.clear()
        if self.alive:
            self.relay.connected = False

    @precondition(lambda self: self.alive)
    @rule()
    def reboot_host(self) -> None:
        """Only what is on the disk is left: the database, and the machines' files."""
        self.kill()
        self.world.domains = dict.fromkeys(self.world.domains, "ended")
        for lost in (self.world.offers, self.world.sessions, self.world.events):
            lost.clear()

    @rule()
    def end_misfortune(self) -> None:
        self.world.down = self.world.full = self.world.database_full = self.world.relay_away = False
        self.world.broken = set()

    @precondition(lambda self: self.world.domains)
    @rule(data=some.data(), left=some.booleans())
    def end_domain(self, data: some.DataObject, left: bool) -> None:
        lease = _one_of(self.world.domains, data)
        if left:
            self.world.domains[lease] = "ended"
        else:
            del self.world.domains[lease]
        if self.world.sessions.pop(lease, None):
            self.world.events.append(("ended", lease))

    @rule(number=some.integers(0, 3))
    def appear_late(self, number: int) -> None:
        """libvirt makes a machine that a killed service had asked it for."""
        self.world.domains[f"late-{number}"] = "running"

    # The administrator

    @rule(data=some.data(), kind=some.sampled_from(ORDERS))
    def administer(self, data: some.DataObject, kind: str) -> None:
        match kind:
            case "promote":
                self.world.promoted = data.draw(some.sampled_from(VERSIONS[:-1]))
            case "pause":
                self.observer.set_mode(POOL, Mode.PAUSED)
            case "drain":
                self.observer.set_mode(POOL, Mode.DRAINING)
            case "serve":
                self.observer.set_mode(POOL, Mode.SERVING)
            case _:
                sizes = some.none() | some.integers(0, MAXIMUM + 1)
                self.observer.resize(POOL, data.draw(sizes), data.draw(sizes))

    @precondition(lambda self: self.world.domains)
    @rule(data=some.data(), kind=some.sampled_from(ORDERS_OF_ONE))
    def administer_one(self, data: some.DataObject, kind: str) -> None:
        living = self.observer.living(POOL)
        # Mostly what can be done.
        fitting = {"pause": State.CLEAN, "resume": State.PAUSED}.get(kind)
        chosen = [one.lease for one in living if one.state == fitting] or [one.lease for one in living]
        if not chosen:
            return
        lease = _one_of(chosen, data)
        match kind:
            case "pause":
                if self.observer.pause(lease):
                    self.world.paused.add(lease)
            case "resume":
                held = lease in self._held()
                assert self.observer.resume(lease) == held
                self.world.paused.discard(lease)
            case "drain":
                self.observer.end(lease, "told to", UNUSED)
                assert lease not in self.world.sessions or self.observer.get(lease).offered
                self.world.paused.discard(lease)
            case _:
                self.observer.end(lease, "told to")
                self.world.paused.discard(lease)

    def _held(self) -> set[str]:
        """The machines that are paused by the database."""
        return {one.lease for one in self.observer.living(POOL) if one.state == State.PAUSED}

    # The rules

    @invariant()
    def check(self) -> None:
        assert not self.world.wrong
        assert max(self.world.ever_offered.values(), default=0) <= 1, "offered twice"
        assert max(self.world.ever_linked.values(), default=0) <= 1, "two sessions"

    @invariant()
    def check_database(self) -> None:
        living = {machine.lease: machine for machine in self.observer.living(POOL)}
        assert len(living) <= 6, "more than the maximum"
        for lease in self.world.offers.keys() | self.world.sessions.keys():
            assert self.observer.get(lease).offered, "the relay heard of it before the database"
        for machine in living.values():
            if machine.state in (State.CLEAN, State.PAUSED):
                assert not self.world.ever_offered[machine.lease], "offered, and clean again"
        # The pool leaves a paused machine alone for as long as it runs.
        held = {one.lease for one in living.values() if one.state == State.PAUSED}
        assert held <= self.world.paused
        assert {lease for lease in self.world.paused if self.world.domains.get(lease) == "running"} <= held
        for lease in self.world.domains.keys() - living.keys():
            if lease.startswith("late-"):
                continue
            # A make that a kill interrupted cannot go on; nothing is forgotten before it is destroyed.
            assert self.observer.get(lease).state == State.GONE

    def teardown(self) -> None:
        """Whatever happened: when misfortune ends, the pool is as it should be, and nothing is left over."""
        try:
            if hasattr(self, "loop"):
                self._settle()
        finally:
            self.close()

    def close(self) -> None:
        if self.alive:
            self.kill()
        logging.getLogger("vdibuild.pool").removeHandler(self.watch)
        self.observer.close()
        self.directory.cleanup()

    def _settle(self) -> None:
        event(f"{min(3, len(self.world.ever_offered))} machines offered")
        event(f"{min(3, len(self.world.ever_linked))} sessions")
        event(f"{min(3, self.kills)} kills")
        event(f"{min(3, len(self._held()))} paused machines at the end")
        self.end_misfortune()
        self.observer.set_mode(POOL, Mode.SERVING)
        self.observer.resize(POOL, None, None)
        if not self.alive:
            self._start()
        for place in self.places:
            place.leave()
        # Sessions in progress go on: whatever happened, nobody was thrown out who had not been before.
        self.let_time_pass(SETTLE_SECONDS)
        sessions = set(self.world.sessions)
        living = self.observer.living(POOL)
        assert {one.lease for one in living if one.state == State.IN_USE} == sessions
        paused = self._held()
        if len(sessions) + len(paused) <= MAXIMUM - CLEAN:
            self.let_time_pass(SETTLE_SECONDS)
            states = Counter(one.state for one in self.observer.living(POOL))
            expected = Counter(
                {State.CLEAN: CLEAN, State.IN_USE: len(self.world.sessions), State.PAUSED: len(paused)}
            )
            assert states == +expected, states
        assert set(self.world.domains) == {one.lease for one in self.observer.living(POOL)}, (
            "left over, or lost"
        )


def _one_of(leases: Collection[str], data: some.DataObject) -> str:
    """A lease by its number: the leases themselves are other ones every time."""
    return list(leases)[data.draw(some.integers(0, len(leases) - 1))]


PoolRules.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPoolRules = PoolRules.TestCase


def test_what_a_killed_service_began_becomes_clean_in_the_next() -> None:
    with contextlib.closing(PoolRules()) as pool:
        pool.restart()
        while not pool.world.domains:
            pool.go_on(1)
        begun = set(pool.world.domains)
        pool.kill()
        pool.restart()
        pool.let_time_pass(100)
        assert begun <= {one.lease for one in pool.observer.living(POOL) if one.state == State.CLEAN}
