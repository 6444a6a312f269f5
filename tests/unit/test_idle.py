"""Sessions that nobody uses: a warning, a reprieve, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tests.pool import IMAGE, POOL, VERSION, NotedRelay
from vdibuild.pool.broker import Limits
from vdibuild.pool.clones import Endpoint, Found
from vdibuild.pool.leases import Leases, Machine, State
from vdibuild.pool.service import Service, Wishes


@dataclass
class ToldCloner:
    """Makes nothing; notes what machines are told."""

    told: list[str] = field(default_factory=list)

    async def promoted(self) -> str:
        return VERSION

    async def keep(self, versions: Set[str]) -> None:
        pass

    async def room(self) -> int:
        return 0

    async def make(self, machine: Machine) -> Endpoint:
        raise AssertionError("nothing is to be made")

    async def finish(self, machine: Machine) -> Endpoint:
        raise AssertionError("nothing is to be made")

    async def destroy(self, lease: str) -> None:
        pass

    async def found(self) -> dict[str, Found]:
        return {}

    async def tell(self, lease: str, text: str) -> None:
        self.told.append(text)


def test_a_session_that_nobody_uses(tmp_path: Path) -> None:
    leases = Leases(f"sqlite:///{tmp_path / 'leases.db'}")
    machine = leases.start(POOL, IMAGE, VERSION, 1)
    assert machine
    leases.clean(machine.lease)
    leases.offer(POOL, ["reception"])
    leases.link(machine.lease, "10.0.0.1")
    cloner = ToldCloner()
    wishes = Wishes(IMAGE, lambda _: 0, 1, idle=timedelta(minutes=10))

    async def scene() -> None:
        service = Service(POOL, wishes, leases, cloner, NotedRelay(), Limits())
        for minutes in (0, 8.9, 9.1, 9.9, 0.1, 9.5):
            service.idle({machine.lease: minutes * 60})
            await asyncio.sleep(0)
        # Once at 9.1, and again after somebody came back.
        assert cloner.told == ["This session ends in a minute, for nobody uses it."] * 2
        assert leases.get(machine.lease).state == State.IN_USE
        service.idle({machine.lease: 600})

    asyncio.run(scene())
    ended = leases.get(machine.lease)
    leases.close()
    assert (ended.state, ended.reason) == (State.DIRTY, "nobody used it")
