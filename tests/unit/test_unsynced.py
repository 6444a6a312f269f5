"""Commands whose synchronisation is suppressed."""

from __future__ import annotations

import sys

import pytest

from vdibuild import process, unsynced

# A pipe cannot be synchronised: fsync fails there with EINVAL, unless the kernel never sees it.
PROBE = "import os; reading, writing = os.pipe(); os.fsync(writing); os.fdatasync(writing); print('done')"


def test_fsync_succeeds_and_does_nothing() -> None:
    argv = unsynced.command([sys.executable, "-c", PROBE])
    assert process.run(argv, capture=True).stdout == "done\n"


def test_without_it_fsync_would_fail() -> None:
    assert process.run([sys.executable, "-c", PROBE], capture=True, check=False).status != 0


def test_children_inherit_it() -> None:
    argv = unsynced.command(["sh", "-c", 'exec "$0" -c "$1"', sys.executable, PROBE])
    assert process.run(argv, capture=True).stdout == "done\n"


def test_the_sandbox_suppresses_what_it_is_told() -> None:
    # ftruncate(2) of a pipe fails with EINVAL.
    probe = PROBE.replace("print", "os.ftruncate(writing, 0); print")
    with unsynced.sandboxed([sys.executable, "-c", probe], [77]) as (argv, descriptors):
        assert process.run(argv, capture=True, pass_fds=descriptors).stdout == "done\n"
    with unsynced.sandboxed([sys.executable, "-c", probe]) as (argv, descriptors):
        assert process.run(argv, capture=True, pass_fds=descriptors, check=False).status != 0


@pytest.mark.parametrize("status", [0, 3])
def test_the_commands_status_is_its_own(status: int) -> None:
    argv = unsynced.command(["sh", "-c", f"exit {status}"])
    assert process.run(argv, check=False).status == status
