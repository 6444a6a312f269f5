"""Two hundred sessions at a pool while broker, relay, machines and libvirt are killed and its disk is full.

`pytest -s tests/long/test_pool_chaos.py`, as root. VDIBUILD_SEED makes it be done as it was once before, as
far as the processes of a host do the same thing twice; VDIBUILD_SESSIONS makes it longer or shorter.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import chaos
from tests.guest.conftest import SiteDirectory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

SESSIONS = int(os.environ.get("VDIBUILD_SESSIONS", "200"))
PAUSES = (0.4, 1.0)
"""Between two misfortunes: as parts of the time in which the clean machines start; else none would."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteDirectory]:
    (tmp_path / "site").mkdir()
    directory = SiteDirectory(tmp_path / "site", tmp_path / "cache")
    yield directory
    directory.close()


def test_every_station_is_served_and_nothing_dirty_handed_out(site: SiteDirectory, tmp_path: Path) -> None:
    seed = int(os.environ.get("VDIBUILD_SEED", secrets.randbelow(1 << 32)))
    print(f"\nVDIBUILD_SEED={seed}")
    directory = tmp_path / "libvirt"
    directory.mkdir()
    began = time.monotonic()

    async def scene() -> None:
        async with chaos.pool(site, directory, chaos.LARGE) as made:
            started = time.monotonic()
            await made.clean()
            took = time.monotonic() - started
            await chaos.run(made, SESSIONS, seed, (PAUSES[0] * took, PAUSES[1] * took))
            made.check()
            told(made)
            assert len(made.visits) == SESSIONS
            # Of the machines that were killed under their stations not all could be looked into.
            assert sum(visit.seen for visit in made.visits) > SESSIONS * 0.8
            assert len(made.done) == 7, "not everything has happened"

    def told(made: chaos.Pool) -> None:
        print(f"{SESSIONS} sessions in {time.monotonic() - began:.0f} s, at most {made.most} machines")
        print(f"seen inside: {sum(visit.seen for visit in made.visits)}")
        print(
            f"asked to seated: median {statistics.median(made.waits):.1f} s, longest {max(made.waits):.1f} s"
        )
        print(f"ends: {dict(made.ends)}\nhappened: {dict(made.done)}")

    asyncio.run(scene())
    assert site.wait_until_clean() == []
