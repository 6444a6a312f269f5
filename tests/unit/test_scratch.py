"""Temporary directories: nothing of ours stays, and nothing of others is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vdibuild import scratch

WORKER = """
import os, sys
from pathlib import Path
from vdibuild import scratch
with scratch.beside(Path(sys.argv[1])) as directory:
    (directory / "half").write_text("half-done")
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_it_is_removed_at_the_end_and_on_an_error(tmp_path: Path) -> None:
    with scratch.beside(tmp_path / "new/output") as directory:
        (directory / "file").write_text("")
        assert directory.parent == tmp_path / "new"
    with pytest.raises(ValueError, match="stop"), scratch.beside(tmp_path / "new/output"):
        raise ValueError("stop")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_nothing_else(
    tmp_path: Path,
) -> None:
    output = tmp_path / "a [strange] *name"
    mine = tmp_path / f".{output.name}-mine"
    mine.mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(scratch.__file__).parents[1])},
        )
        for _ in range(2)
    ]
    try:
        places = [Path(worker.stdout.readline().strip()) for worker in workers if worker.stdout]
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        assert places[0].exists()
        with scratch.beside(output):
            assert not places[0].exists()
            assert (places[1] / "half").exists()
            assert mine.exists()
    finally:
        for worker in workers:
            worker.communicate()
    assert not places[1].exists()


def test_what_a_run_left_that_was_killed_before_it_began_or_at_its_very_end(tmp_path: Path) -> None:
    (tmp_path / ".output-0123abcd").mkdir()
    (tmp_path / ".output-89abcdef").write_text("somebody's")
    (tmp_path / ".output-02468ace").mkdir()
    (tmp_path / ".output-02468ace" / "somebody's").write_text("")
    scratch.remove_left(tmp_path / "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".output-02468ace", ".output-89abcdef"]


def test_one_that_begins_is_not_taken_for_one_that_was_left(tmp_path: Path) -> None:
    def use(_: int) -> None:
        for _ in range(100):
            with scratch.beside(tmp_path / "output") as directory:
                (directory / "file").touch()

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(use, range(4)))
    assert list(tmp_path.iterdir()) == []
