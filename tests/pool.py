"""A relay that notes what it is told, and a pool with machines that nobody runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from vdibuild.pool.broker import Broker, Limits, RelayAwayError
from vdibuild.pool.clones import Endpoint
from vdibuild.pool.leases import Leases, Machine

POOL = "desktop"
IMAGE = "debian-13"
VERSION = "20260101.1"


@dataclass
class NotedRelay:
    """A relay that lets nobody in. told: each message and its lease. offers: what is offered, by lease."""

    connected: bool = True
    told: list[tuple[str, str]] = field(default_factory=list)
    offers: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    def offer(
        self, lease: str, endpoint: Endpoint, station: str | None, ticket: str | None, seconds: float
    ) -> None:
        self._tell("offer", lease)
        self.offers[lease] = (station, ticket)

    def revoke(self, lease: str) -> None:
        self._tell("revoke", lease)
        self.offers.pop(lease, None)

    def end(self, lease: str, reason: str) -> None:
        self._tell("end", lease)
        self.offers.pop(lease, None)

    def _tell(self, message: str, lease: str) -> None:
        if not self.connected:
            raise RelayAwayError("the relay is away")
        self.told.append((message, lease))


@dataclass
class Desk:
    """A broker over real leases; `clean` gives it machines."""

    leases: Leases
    relay: NotedRelay
    broker: Broker
    endpoints: dict[str, Endpoint]
    changes: list[None] = field(default_factory=list)

    def clean(self) -> Machine:
        """Enter a machine that is clean, as the service does."""
        machine = self.leases.start(POOL, IMAGE, VERSION, 1000)
        assert machine
        self.endpoints[machine.lease] = Endpoint(Path("/nowhere"), "secret")
        assert self.leases.clean(machine.lease)
        self.broker.match()
        return machine


def desk(directory: Path, limits: Limits | None = None) -> Desk:
    """A broker whose database is in a directory."""
    leases = Leases(f"sqlite:///{directory / 'leases.db'}")
    relay = NotedRelay()
    endpoints: dict[str, Endpoint] = {}
    changes: list[None] = []
    broker = Broker(POOL, leases, relay, endpoints, limits or Limits(), lambda: changes.append(None))
    return Desk(leases, relay, broker, endpoints, changes)


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def lapsing(broker: Broker) -> AsyncIterator[None]:
    """Let offers lapse for as long as the block runs, as the service does."""

    async def loop() -> None:
        while True:
            broker.lapse()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(loop())
    try:
        yield
    finally:
        task.cancel()
