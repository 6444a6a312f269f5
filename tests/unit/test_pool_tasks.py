"""The administrator's tasks, as commands, on a pool that nobody serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdibuild.pool.leases import Leases, Machine, Mode, State

SITE = """\
images:
  small: {family: debian, release: trixie, kickstart: small.ks.j2}
pools:
  desktop: {image: small, directory: pools}
"""


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    (tmp_path / "vdibuild.yaml").write_text(SITE)
    (tmp_path / "pools/desktop").mkdir(parents=True)
    return Leases(f"sqlite:///{tmp_path / 'pools/desktop/leases.db'}")


def run(directory: Path, *arguments: str) -> str:
    program = "from vdibuild.console import program; program.run()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=directory,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.stdout}{done.stderr}"


def used(leases: Leases) -> Machine:
    machine = leases.start("desktop", "small", "20260101.1", 8)
    assert machine
    leases.clean(machine.lease)
    leases.offer("desktop", ["reception [bold]"])
    leases.link(machine.lease, "10.0.0.1")
    return leases.get(machine.lease)


def test_status(tmp_path: Path, leases: Leases) -> None:
    machine = used(leases)
    output = run(tmp_path, "pool.status")
    assert "desktop: serving; 1 in use; 2 wanted clean, 8 at most" in output
    assert machine.name in output
    assert "reception [bold]" in output


def test_history(tmp_path: Path, leases: Leases) -> None:
    assert "nobody was offered a machine yet" in run(tmp_path, "pool.leases")
    machine = used(leases)
    leases.traffic(machine.lease, 1 << 20, 5 << 20)
    leases.end(machine.lease, "the station left")
    output = " ".join(run(tmp_path, "pool.leases").split())
    assert machine.name in output
    assert "10.0.0.1" in output
    assert "1 MiB 5 MiB" in output
    assert "nobody" in run(tmp_path, "pool.leases", "--station", "10.0.0.2")


def test_modes(tmp_path: Path, leases: Leases) -> None:
    for task, mode in (("drain", Mode.DRAINING), ("pause", Mode.PAUSED), ("resume", Mode.SERVING)):
        assert f"the pool desktop is {mode}" in run(tmp_path, f"pool.{task}")
        assert leases.sizing("desktop").mode == mode


def test_one_machine_out_and_back(tmp_path: Path, leases: Leases) -> None:
    machine = leases.start("desktop", "small", "20260101.1", 8)
    assert machine
    arguments = ("--machine", machine.name)
    assert f"{machine.name} is starting: only a clean" in run(tmp_path, "pool.pause", *arguments)
    leases.clean(machine.lease)
    assert f"{machine.name} is paused" in run(tmp_path, "pool.pause", *arguments)
    assert "desktop: serving; 1 paused; 2 wanted clean" in run(tmp_path, "pool.status")
    assert leases.offer("desktop", ["reception"]) == []
    assert f"{machine.name} is clean again" in run(tmp_path, "pool.resume", *arguments)
    assert f"error: {machine.name} is clean, not paused" in run(tmp_path, "pool.resume", *arguments)
    assert len(leases.offer("desktop", ["reception"])) == 1


def test_draining_one_machine_ends_no_session(tmp_path: Path, leases: Leases) -> None:
    taken, waiting = used(leases), leases.start("desktop", "small", "20260101.1", 8)
    assert waiting
    assert "it ends with its session" in run(tmp_path, "pool.drain", "--machine", taken.name)
    assert leases.get(taken.lease).state == State.IN_USE
    assert f"{waiting.name} will be destroyed" in run(tmp_path, "pool.drain", "--machine", waiting.name)
    assert leases.get(waiting.lease).state == State.DIRTY


def test_resize(tmp_path: Path, leases: Leases) -> None:
    assert run(tmp_path, "pool.resize", "--clean", "3", "--maximum", "9") == ""
    assert (leases.sizing("desktop").clean, leases.sizing("desktop").maximum) == (3, 9)
    run(tmp_path, "pool.resize")
    assert (leases.sizing("desktop").clean, leases.sizing("desktop").maximum) == (None, None)


def test_destroy(tmp_path: Path, leases: Leases) -> None:
    machine = used(leases)
    assert f"{machine.name} will be destroyed" in run(tmp_path, "pool.destroy", machine.name)
    assert leases.get(machine.lease).state == State.DIRTY
    assert "error: desktop has no machine nobody" in run(tmp_path, "pool.destroy", "nobody")
