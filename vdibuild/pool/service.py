"""Keeps a pool as it should be: so many clean machines, none too old, nothing left of those that ended.

Everything is done by looking at what is, in the database and on the hypervisor, and taking the next step
towards what should be. It makes no difference whether a step is the first ever, or follows a kill -9, a
reboot of the host, or someone's `virsh destroy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from vdibuild.errors import StoreError, VdibuildError, VerificationError
from vdibuild.pool.broker import Broker, Limits, Relay
from vdibuild.pool.clones import Cloner, Endpoint, Found
from vdibuild.pool.leases import Leases, Machine, Mode, Sizing, State
from vdibuild.pool.pace import Pace

LOOK_SECONDS = 1.0
"""How often everything is looked at when nothing is heard."""

SURVEY_SECONDS = 10.0
"""How often the hypervisor is asked what there is."""

ATTEMPTS = 3
"""A version whose newest clones, so many of them, all failed to become clean is given up for a while."""

PROBE_SECONDS = 600.0
"""How often a version that failed is given another chance."""

WARNING = timedelta(minutes=5)
"""How long before the end of its session a station is warned."""

IDLE_WARNING = timedelta(minutes=1)
"""How long before an unused session ends its station is warned."""

_GATHER_SECONDS = 0.02  # so that a hundred stations at once are looked at once
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_DESTROY_AGAIN_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What a pool should be. image: its name. clean: how many machines to keep ready, by the time of day.
    maximum: how many there may be. session: how long one may last, None for ever. idle: how long
    one may go unused, None for ever. parallel: how many
    starts at a time at most, whatever is measured.
    """

    image: str
    clean: Callable[[datetime], int]
    maximum: int
    session: timedelta | None = None
    idle: timedelta | None = None
    parallel: int = 8


class Service:
    """One pool, kept (see `running`). clock: what tells the time, local time included."""

    def __init__(
        self,
        pool: str,
        wishes: Wishes,
        leases: Leases,
        cloner: Cloner,
        relay: Relay,
        limits: Limits,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.pool = pool
        self._wishes = wishes
        self._leases = leases
        self._cloner = cloner
        self._relay = relay
        self._clock = clock
        self._endpoints: dict[str, Endpoint] = {}
        self.broker = Broker(pool, leases, relay, self._endpoints, limits, self._changed)
        self.pace = Pace(wishes.parallel)
        self._wake = asyncio.Event()
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        self._warned: dict[str, asyncio.Task[None]] = {}
        self._woken: dict[str, asyncio.Task[None]] = {}
        self._failures = 0
        self._failed_last = 0.0
        self._not_before = 0.0
        self._failing: str | None = None
        self._probed = 0.0
        self.refusals = 0
        self._missing: set[str] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the pool for as long as the block runs, which begins when its true state is known.

        At the end of the block machines stay as they are: sessions go on, and the next service takes over.
        """
        self._go_on_with(await self._survey())
        loops = [
            asyncio.create_task(self._repeat(self._look, LOOK_SECONDS)),
            asyncio.create_task(self._repeat(self._survey, SURVEY_SECONDS)),
        ]
        try:
            yield
        finally:
            warnings = [*self._warned.values(), *self._woken.values()]
            tasks = [*loops, *self._starts.values(), *self._ends.values(), *warnings]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def linked(self, lease: str, address: str) -> None:
        """See relay_link.Listener."""
        self.broker.linked(lease, address)

    def ended(self, lease: str, reason: str, bytes_in: int, bytes_out: int) -> None:
        """See relay_link.Listener."""
        self.broker.ended(lease, reason, bytes_in, bytes_out)

    def refused(self, address: str, reason: str, times: int) -> None:
        """See relay_link.Listener."""
        _log.warning("pool %s: %s refused %d times: %s", self.pool, address, times, reason)
        self.refusals += times

    def machine_failed(self, lease: str, message: str) -> None:
        """See relay_link.Listener."""
        self.broker.end(lease, message)

    def idle(self, seconds: dict[str, float]) -> None:
        """See relay_link.Listener."""
        longest = self._wishes.idle
        if longest is None:
            return
        for lease, unused in seconds.items():
            left = longest - timedelta(seconds=unused)
            if left <= timedelta():
                self.broker.end(lease, "nobody used it")
            elif left > IDLE_WARNING:
                self._woken.pop(lease, None)
            elif longest > IDLE_WARNING and lease not in self._woken:
                text = "This session ends in a minute, for nobody uses it."
                self._woken[lease] = asyncio.create_task(self._warn(lease, text))

    def relay_state(self, sessions: dict[str, str], offers: set[str]) -> bool:
        """See relay_link.Listener.

        What it has and we have ended is ended; what we have and it does not was lost. That is believed when
        it is said twice, for an offer may have been made since the relay was asked.
        """
        living = {machine.lease: machine for machine in self._leases.living(self.pool)}
        for lease, address in sessions.items():
            if lease in living and living[lease].state == State.OFFERED:
                self.broker.linked(lease, address)
        served = {lease for lease, one in living.items() if one.state in (State.OFFERED, State.IN_USE)}
        for lease in (sessions.keys() | offers) - served:
            with contextlib.suppress(VdibuildError):
                self._relay.end(lease, "this lease is over")
        missing = served - sessions.keys() - offers
        for lease in missing & self._missing:
            self.broker.end(lease, "its session was lost with the relay")
        self._missing = missing - self._missing
        return bool(self._missing)

    def _changed(self) -> None:
        self._wake.set()

    async def _repeat(self, step: Callable[[], Coroutine[Any, Any, object]], seconds: float) -> None:
        """Take a step again and again: after so many seconds; `_look` also as soon as something changed."""
        while True:
            if step == self._look:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), seconds)
                await asyncio.sleep(_GATHER_SECONDS)
                self._wake.clear()
            else:
                await asyncio.sleep(seconds)
            try:
                await step()
            except VdibuildError as error:
                # The next look may find it mended: a full disk, a hypervisor that is being restarted.
                _log.error("pool %s: %s", self.pool, error)
            except Exception:
                # A defect that one look meets must not leave the pool unattended: the next one goes on.
                _log.exception("pool %s", self.pool)

    async def _survey(self) -> dict[str, Found]:
        """Compare what the hypervisor has with what is known here. Returns what it has, by lease."""
        before = {machine.lease: machine for machine in self._leases.living(self.pool)}
        found = await self._cloner.found()
        living = {machine.lease for machine in self._leases.living(self.pool)}
        # What was looked for while it came or went is looked for again the next time.
        for lease in found.keys() - before.keys() - living - self._ends.keys():
            _log.warning("lease %s: what is left of it belongs to nobody, and is removed", lease)
            self._ends[lease] = asyncio.create_task(self._remove(lease))
        visible = {lease for lease, machine in before.items() if machine.state in _VISIBLE}
        for lease in visible & living:
            seen = found.get(lease)
            if seen is None or seen.endpoint is None:
                self.broker.end(lease, "the machine ended by itself")
            elif seen.trouble:
                self.broker.end(lease, seen.trouble)
            else:
                self._endpoints[lease] = seen.endpoint
        self._changed()
        return found

    def _go_on_with(self, found: dict[str, Found]) -> None:
        """Finish what the service before this one began to make, where the machine runs."""
        for machine in self._leases.living(self.pool):
            seen = found.get(machine.lease)
            if machine.state == State.STARTING and seen and seen.endpoint and not seen.trouble:
                self._starts[machine.lease] = asyncio.create_task(self._make(machine, self._cloner.finish))

    async def _look(self) -> None:
        """Take every next step there is."""
        self.broker.lapse()
        sizing = self._leases.sizing(self.pool)
        machines = self._leases.living(self.pool)
        for machine in machines:
            if machine.state == State.STARTING and machine.lease not in self._starts:
                self._leases.end(machine.lease, "the service that made it ended", (State.STARTING,))
        self._limit_sessions(machines)
        if sizing.mode == Mode.DRAINING:
            for machine in machines:
                self._leases.end(machine.lease, "the pool is drained", (State.STARTING, State.CLEAN))
        self._remove_dirty()
        self.broker.match()
        if sizing.mode == Mode.SERVING:
            await self._refill(sizing)

    def _limit_sessions(self, machines: list[Machine]) -> None:
        longest = self._wishes.session
        if longest is None:
            return
        for machine in machines:
            if machine.state != State.IN_USE or machine.linked is None:
                continue
            left = machine.linked + longest - self._clock()
            if left <= timedelta():
                self.broker.end(machine.lease, "its time was over")
            elif left <= WARNING and longest > WARNING and machine.lease not in self._warned:
                text = f"This session ends in {max(1, round(left.total_seconds() / 60))} minutes."
                self._warned[machine.lease] = asyncio.create_task(self._warn(machine.lease, text))

    def _remove_dirty(self) -> None:
        for machine in self._leases.living(self.pool):
            if machine.state == State.DIRTY and machine.lease not in self._ends:
                start = self._starts.get(machine.lease)
                if start:
                    start.cancel()
                    continue  # it tells us when it has ended
                self._endpoints.pop(machine.lease, None)
                if machine.offered:
                    with contextlib.suppress(VdibuildError):
                        self._relay.end(machine.lease, machine.reason or "")
                self._ends[machine.lease] = asyncio.create_task(self._remove(machine.lease))

    async def _refill(self, sizing: Sizing) -> None:
        """Start what is missing, end what is too much or of another version than it should be."""
        wanted = sizing.clean if sizing.clean is not None else self._wishes.clean(self._clock())
        maximum = sizing.maximum if sizing.maximum is not None else self._wishes.maximum
        version = await self._version()
        machines = self._leases.living(self.pool)
        clean = [machine for machine in machines if machine.state == State.CLEAN]
        starting = [machine for machine in machines if machine.state == State.STARTING]
        ready = min(wanted + self.broker.waiting, maximum)
        old = [machine for machine in clean if machine.version != version]
        fresh = [machine for machine in clean if machine.version == version]
        missing = ready - len(fresh) - len(starting)
        surplus = len(clean) - ready
        coming = any(machine.state in (State.STARTING, State.DIRTY) for machine in machines)
        if old and missing > 0 and len(machines) >= maximum and not coming:
            # Only the end of an old one makes place for a new one.
            surplus = max(surplus, 1)
        for machine in [*old, *reversed(fresh)][: max(0, surplus)]:
            reason = "another version is promoted" if machine in old else "fewer are wanted"
            if self._leases.end(machine.lease, reason, (State.CLEAN,)):
                self._changed()
        now = asyncio.get_running_loop().time()
        places = min(missing, maximum - len(machines), self.pace.limit - len(self._starts))
        if places <= 0 or now < self._not_before:
            return
        for _ in range(min(places, await self._cloner.room())):
            started = self._leases.start(self.pool, self._wishes.image, self._given(version), maximum)
            if started is None:
                return
            parallel = len(self._starts) + 1
            self._starts[started.lease] = asyncio.create_task(
                self._make(started, self._cloner.make, parallel)
            )

    async def _version(self) -> str:
        """The version to clone: the promoted one, or the last that worked while that one's clones fail."""
        promoted = await self._cloner.promoted()
        proven = self._leases.proven(self.pool, self._wishes.image, besides=promoted)
        await self._cloner.keep({promoted, *([proven] if proven else [])})
        attempts = self._leases.attempts(self.pool, promoted, ATTEMPTS)
        if proven is None or len(attempts) < ATTEMPTS or any(attempts):
            self._failing = None
            return promoted
        if self._failing != promoted:
            _log.error("pool %s: clones of %s fail; back to %s", self.pool, promoted, proven)
            self._failing = promoted
            self._probed = asyncio.get_running_loop().time()
        return proven

    def _given(self, version: str) -> str:
        """The version of the next start: `version`, but now and then the one that was given up."""
        now = asyncio.get_running_loop().time()
        if self._failing is not None and now - self._probed >= PROBE_SECONDS:
            self._probed = now
            return self._failing
        return version

    async def _make(
        self, machine: Machine, make: Callable[[Machine], Awaitable[Endpoint]], parallel: int | None = None
    ) -> None:
        """Make a machine clean. parallel: how many are being made, None when not all of it is done here."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._endpoints[machine.lease] = await make(machine)
            if self._leases.clean(machine.lease):
                self._failures = 0
                if parallel:
                    self.pace.record(parallel, loop.time() - began)
                _log.info("lease %s: %s is clean", machine.lease, machine.name)
                self.broker.match_soon()
        except VdibuildError as error:
            _log.error("lease %s: %s did not become clean: %s", machine.lease, machine.name, error)
            self._failed(machine, error, began)
        finally:
            del self._starts[machine.lease]
            self._changed()

    def _failed(self, machine: Machine, error: VdibuildError, began: float) -> None:
        """Note that a machine did not become clean, and wait a while before the next start.

        began: when its start did, by the event loop's clock.
        """
        try:
            if isinstance(error, VerificationError | StoreError):
                self._leases.fail(machine.lease, error.message)
            else:
                # The host's fault, not the image's.
                self._leases.end(machine.lease, error.message, (State.STARTING,))
        except VdibuildError as worse:
            # It stays `starting`, and nobody makes it: the next look ends it.
            _log.error("lease %s: %s", machine.lease, worse)
        now = asyncio.get_running_loop().time()
        if began < self._failed_last:
            return  # several starts that one trouble ended count once
        self._failed_last = now
        self._not_before = now + min(_FIRST_PAUSE_SECONDS * 2**self._failures, _LONGEST_PAUSE_SECONDS)
        self._failures = min(self._failures + 1, 16)

    async def _remove(self, lease: str) -> None:
        try:
            await self._cloner.destroy(lease)
            if self._leases.gone(lease):
                _log.info("lease %s: gone", lease)
        except VdibuildError as error:
            _log.error("lease %s: it is not gone yet: %s", lease, error)
            await asyncio.sleep(_DESTROY_AGAIN_SECONDS)
        finally:
            del self._ends[lease]
            for warnings in (self._warned, self._woken):
                warned = warnings.pop(lease, None)
                if warned:
                    warned.cancel()
            self._changed()

    async def _warn(self, lease: str, text: str) -> None:
        try:
            await self._cloner.tell(lease, text)
        except VdibuildError as error:
            _log.warning("lease %s: the station could not be warned: %s", lease, error)


_VISIBLE = (State.CLEAN, State.PAUSED, State.OFFERED, State.IN_USE)
"""The states in which a machine has to run."""
