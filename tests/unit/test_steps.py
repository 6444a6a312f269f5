from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vdibuild.steps import Planned, Steps


def planned(key: str) -> Planned:
    return Planned("make", "1", key, cached=False)


MAKE = planned("make-1")


def writing(text: str) -> Callable[[Path], None]:
    def work(place: Path) -> None:
        (place / "result").write_text(text)

    return work


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_finished_step_is_not_done_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    planned = steps.plan("make", {"a": 1})
    assert not planned.cached
    steps.run(planned, writing("first"))
    place = steps.run(planned, lambda _: pytest.fail("it was done again"))
    assert names(place) == ["result"]
    assert steps.plan("make", {"a": 1}).cached


def test_another_input_is_another_step(tmp_path: Path) -> None:
    def key(inputs: dict[str, object]) -> str:
        return Steps(tmp_path).plan("make", inputs).key

    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    assert key({"a": 1}) != key({"a": 2})


def test_fresh_does_a_finished_step_again_but_once(tmp_path: Path) -> None:
    Steps(tmp_path).run(MAKE, writing("old"))
    steps = Steps(tmp_path, fresh=True)
    place = steps.run(MAKE, writing("new"))
    assert (place / "result").read_text() == "new"
    steps.run(MAKE, lambda _: pytest.fail("it was done again"))
    assert names(tmp_path) == ["make-1"]


def test_a_failed_step_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Steps(tmp_path).run(MAKE, fail)
    assert names(tmp_path) == []


def test_a_failed_step_is_kept_when_asked_and_shown_first(tmp_path: Path) -> None:
    shown: list[str] = []

    def fail(place: Path) -> None:
        (place / "half").touch()
        raise RuntimeError("no")

    steps = Steps(tmp_path, keep=True, on_failure=lambda place: shown.extend(names(place)))
    with pytest.raises(RuntimeError):
        steps.run(MAKE, fail)
    assert "half" in shown
    (left,) = tmp_path.iterdir()
    assert (left / "half").exists()
    steps.sweep()
    assert left.exists()


def test_sweep_removes_what_a_killed_run_left_and_nothing_under_way(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom vdibuild.steps import Planned, Steps\n"
        "def work(place):\n    (place / 'half').touch()\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "Steps(Path(sys.argv[1])).run(Planned('make', '1', 'make-1', False), work)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    Steps(tmp_path).sweep()
    assert len(names(tmp_path)) == 1
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    Steps(tmp_path).sweep()
    assert names(tmp_path) == []


def test_sweep_keeps_what_the_last_good_builds_used(tmp_path: Path) -> None:
    old = time.time() - 7 * 24 * 3600
    first = Steps(tmp_path)
    for key in ("a-1", "b-1"):
        first.run(planned(key), lambda place: (place / "result").touch())
    first.remember("image")
    second = Steps(tmp_path)
    second.run(planned("a-1"), lambda _: pytest.fail("it was done again"))
    second.remember("image")
    for key in ("a-1", "b-1"):
        os.utime(tmp_path / key, (old, old))
    Steps(tmp_path).sweep()
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["a-1"]
