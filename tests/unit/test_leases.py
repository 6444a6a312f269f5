"""Leases on a real database, with real threads and processes that want the same machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.pool import IMAGE, POOL, VERSION
from vdibuild.errors import HostError, VdibuildError
from vdibuild.pool.leases import Leases, Machine, Mode, State


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def url(directory: Path) -> str:
    return f"sqlite:///{directory / 'leases.db'}"


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    found = Leases(url(tmp_path), Clock())
    yield found
    found.close()


def start(leases: Leases, maximum: int = 1000, version: str = VERSION) -> Machine:
    machine = leases.start(POOL, IMAGE, version, maximum)
    assert machine is not None
    return machine


def clean(leases: Leases, version: str = VERSION) -> Machine:
    machine = start(leases, version=version)
    assert leases.clean(machine.lease)
    return machine


def offer(leases: Leases, station: str) -> Machine | None:
    return next(iter(leases.offer(POOL, [station])), None)


def in_state(leases: Leases, state: State) -> Machine:
    machine = start(leases)
    if state == State.PAUSED:
        assert leases.clean(machine.lease)
        assert leases.pause(machine.lease)
        return leases.get(machine.lease)
    steps: list[Callable[[], bool]] = [
        lambda: leases.clean(machine.lease),
        lambda: offer(leases, "someone") is not None,
        lambda: leases.link(machine.lease, "10.0.0.1"),
        lambda: leases.end(machine.lease, "left"),
        lambda: leases.gone(machine.lease),
    ]
    for step in steps:
        if leases.get(machine.lease).state == state:
            break
        assert step()
    return leases.get(machine.lease)


def test_a_life(leases: Leases) -> None:
    lease = in_state(leases, State.IN_USE).lease
    assert leases.end(lease, "the station left")
    leases.traffic(lease, 12, 3_000_000_000)
    assert leases.gone(lease)
    machine = leases.get(lease)
    assert (machine.state, machine.station, machine.address) == (State.GONE, "someone", "10.0.0.1")
    assert machine.reason == "the station left"
    assert (machine.bytes_in, machine.bytes_out) == (12, 3_000_000_000)
    times = [machine.started, machine.cleaned, machine.offered, machine.linked, machine.ended]
    assert None not in times
    assert all(earlier < later for earlier, later in itertools.pairwise(times) if earlier and later)
    assert machine.removed
    assert machine.started.tzinfo is UTC
    assert leases.living(POOL) == []
    assert leases.history(POOL, 10) == [machine]


ALLOWED = {
    "clean": {State.STARTING},
    "fail": {State.STARTING},
    "pause": {State.CLEAN},
    "resume": {State.PAUSED},
    "link": {State.OFFERED},
    "end": {State.STARTING, State.CLEAN, State.PAUSED, State.OFFERED, State.IN_USE},
    "gone": {State.DIRTY},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("transition", ALLOWED)
def test_no_arrow_leads_elsewhere(leases: Leases, state: State, transition: str) -> None:
    before = in_state(leases, state)
    arguments = {"fail": ("why",), "end": ("why",), "link": ("10.0.0.2",)}.get(transition, ())
    changed = getattr(leases, transition)(before.lease, *arguments)
    assert changed == (state in ALLOWED[transition])
    assert (leases.get(before.lease) != before) == changed


@pytest.mark.parametrize("state", [state for state in State if state != State.CLEAN])
def test_only_clean_machines_are_offered(leases: Leases, state: State) -> None:
    in_state(leases, state)
    assert offer(leases, "another") is None


def test_the_oldest_clean_machine_is_offered_first(leases: Leases) -> None:
    machines = [clean(leases) for _ in range(3)]
    offered = [offer(leases, "someone") for _ in range(4)]
    assert [machine and machine.lease for machine in offered] == [*(one.lease for one in machines), None]


def test_a_paused_machine_keeps_its_turn(leases: Leases) -> None:
    first, second = clean(leases), clean(leases)
    assert leases.pause(first.lease)
    assert leases.get(first.lease).paused
    assert (offer(leases, "someone"), offer(leases, "another")) == (leases.get(second.lease), None)
    third = clean(leases)
    assert leases.resume(first.lease)
    assert leases.get(first.lease).paused is None
    assert [one and one.lease for one in (offer(leases, "a"), offer(leases, "b"))] == [
        first.lease,
        third.lease,
    ]


def test_paused_or_offered_but_never_both(tmp_path: Path) -> None:
    """Someone takes machines while the administrator pauses them: each has one fate."""
    leases = Leases(url(tmp_path))
    machines = [clean(leases).lease for _ in range(40)]

    def take() -> set[str]:
        own = Leases(url(tmp_path))
        taken = set()
        while machine := offer(own, "someone"):
            taken.add(machine.lease)
        own.close()
        return taken

    def pause() -> set[str]:
        own = Leases(url(tmp_path))
        paused = {lease for lease in reversed(machines) if own.pause(lease)}
        own.close()
        return paused

    with ThreadPoolExecutor(2) as pool:
        taken, paused = pool.submit(take), pool.submit(pause)
        assert taken.result() | paused.result() == set(machines)
        assert not taken.result() & paused.result()
    leases.close()


def test_offers_at_once(leases: Leases) -> None:
    machines = [clean(leases) for _ in range(3)]
    offered = leases.offer(POOL, ["a", "b", "c", "d"])
    assert [(one.lease, one.station) for one in offered] == [
        (machine.lease, station) for machine, station in zip(machines, "abc", strict=True)
    ]
    assert offered == leases.living(POOL)


def test_offers_of_another_pool(leases: Leases) -> None:
    clean(leases)
    assert leases.offer("other", ["someone"]) == []
    assert leases.start("other", IMAGE, VERSION, 1) is not None


def test_the_maximum_counts_what_is_not_gone(leases: Leases) -> None:
    first = start(leases, 2)
    second = start(leases, 2)
    assert leases.start(POOL, IMAGE, VERSION, 2) is None
    assert leases.clean(second.lease)
    assert leases.pause(second.lease)
    assert leases.start(POOL, IMAGE, VERSION, 2) is None
    leases.end(first.lease, "why")
    assert leases.start(POOL, IMAGE, VERSION, 2) is None
    leases.gone(first.lease)
    assert leases.start(POOL, IMAGE, VERSION, 2) is not None


def test_macs_and_names(leases: Leases) -> None:
    machines = [start(leases) for _ in range(200)]
    macs = {machine.mac for machine in machines}
    assert len(macs) == len({machine.name for machine in machines}) == 200
    assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in macs)


@pytest.mark.parametrize("mode", [Mode.PAUSED, Mode.DRAINING])
def test_a_pool_that_does_not_serve(leases: Leases, mode: Mode) -> None:
    clean(leases)
    leases.set_mode(POOL, mode)
    assert offer(leases, "someone") is None
    leases.set_mode(POOL, Mode.SERVING)
    assert offer(leases, "someone") is not None


def test_resizing_is_remembered(leases: Leases, tmp_path: Path) -> None:
    leases.resize(POOL, 3, None)
    other = Leases(url(tmp_path))
    assert (other.sizing(POOL).clean, other.sizing(POOL).maximum) == (3, None)
    other.close()


def test_versions_that_proved_themselves(leases: Leases) -> None:
    clean(leases, "20260101.1")
    clean(leases, "20260101.2")
    for _ in range(2):
        assert leases.fail(start(leases, version="20260102.1").lease, "no answer")
    leases.end(start(leases, version="20260102.1").lease, "drained")
    assert leases.attempts(POOL, "20260102.1", 3) == [False, False]
    assert leases.attempts(POOL, "20260101.1", 3) == [True]
    assert leases.proven(POOL, IMAGE, besides="20260102.1") == "20260101.2"
    assert leases.proven(POOL, IMAGE, besides="20260101.2") == "20260101.1"
    assert leases.proven(POOL, "other", besides="x") is None


def test_history_of_a_station(leases: Leases) -> None:
    clean(leases)
    clean(leases)
    offer(leases, "reception")
    second = offer(leases, "10.0.0.9")
    assert second
    assert [entry.lease for entry in leases.history(POOL, 10, "10.0.0.9")] == [second.lease]
    assert len(leases.history(POOL, 1)) == 1


def test_unknown_machines(leases: Leases) -> None:
    machine = start(leases)
    assert leases.find(POOL, machine.name) == machine
    with pytest.raises(VdibuildError, match=f"no machine nobody\n.*{machine.name}"):
        leases.find(POOL, "nobody")


def test_hostile_names(leases: Leases) -> None:
    clean(leases)
    station = "'; DROP TABLE machines; --" + "x" * 1000
    offered = offer(leases, station)
    assert offered is not None
    assert offered.station == station[:255]


def test_everyone_wants_the_same_machines(tmp_path: Path) -> None:
    """Threads with a connection each take all machines; each is given once."""
    leases = Leases(url(tmp_path))
    machines = {clean(leases).lease for _ in range(40)}

    def take(number: int) -> list[str]:
        own = Leases(url(tmp_path))
        taken = []
        while machine := offer(own, f"station-{number}"):
            taken.append(machine.lease)
        own.close()
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [lease for result in pool.map(take, range(8)) for lease in result]
    assert sorted(taken) == sorted(machines)
    leases.close()


def test_everyone_starts_machines(tmp_path: Path) -> None:
    def fill(_: int) -> int:
        own = Leases(url(tmp_path))
        count = sum(own.start(POOL, IMAGE, VERSION, 20) is not None for _ in range(10))
        own.close()
        return count

    Leases(url(tmp_path)).close()
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(fill, range(8))) == 20


def test_a_killed_process_leaves_whole_transitions(tmp_path: Path) -> None:
    """A process that moves machines through their lives is killed; what is left is one of the states."""
    script = f"""
    from vdibuild.pool.leases import Leases
    leases = Leases({url(tmp_path)!r})
    print("ready", flush=True)
    while True:
        machine = leases.start({POOL!r}, {IMAGE!r}, {VERSION!r}, 5)
        leases.clean(machine.lease)
        leases.offer({POOL!r}, ["someone"])
        leases.link(machine.lease, "10.0.0.1")
        leases.end(machine.lease, "left")
        leases.gone(machine.lease)
        print(machine.lease, flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
    leases = Leases(url(tmp_path))
    living = leases.living(POOL)
    assert len(living) <= 1
    for machine in living:
        reached = {State.CLEAN: machine.cleaned, State.OFFERED: machine.offered, State.IN_USE: machine.linked}
        assert reached.get(machine.state, machine.started) is not None
    assert {line.decode().strip() for line in lines[1:]} <= {one.lease for one in leases.history(POOL, 10**6)}
    leases.close()


def test_no_commit_writes_to_the_database_itself(leases: Leases, tmp_path: Path) -> None:
    file = next(tmp_path.glob("*.db"))
    leases.tidy()
    before = file.stat().st_size
    for _ in range(500):
        start(leases)
    assert file.stat().st_size == before
    leases.tidy()
    assert file.stat().st_size > before
    assert len(leases.living(POOL)) == 500


def test_others_cannot_read_the_database(leases: Leases, tmp_path: Path) -> None:
    start(leases)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("leases.db*")} == {0o600}


@pytest.mark.parametrize("bad", ["nonsense", "mysterysql:///x", "sqlite:////nowhere/at/all/leases.db"])
def test_a_database_that_cannot_be_used(bad: str) -> None:
    with pytest.raises(HostError, match="cannot be used") as caught:
        Leases(bad)
    assert "site file" in caught.value.hint


def test_a_database_of_another_version(tmp_path: Path) -> None:
    Leases(url(tmp_path)).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "leases.db")) as database:
        database.execute("ALTER TABLE machines DROP COLUMN paused")
    with pytest.raises(HostError, match=r"made by another vdibuild: it has no machines\.paused") as caught:
        Leases(url(tmp_path))
    assert "keeps the history" in caught.value.hint
