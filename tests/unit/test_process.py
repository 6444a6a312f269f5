from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdibuild import process, progress
from vdibuild.errors import CommandError, DeadlineError, HostError


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_output_goes_to_the_log_and_is_not_returned(tmp_path: Path) -> None:
    with progress.logging_to(tmp_path / "log"):
        done = process.run(["sh", "-c", "echo out; echo err >&2"])
    assert done.stdout == ""
    log = (tmp_path / "log").read_text()
    assert "out" in log
    assert "err" in log


def test_captured_output_is_returned_and_standard_error_logged(tmp_path: Path) -> None:
    with progress.logging_to(tmp_path / "log"):
        done = process.run(["sh", "-c", "echo out; echo oops >&2"], capture=True)
    assert done.stdout == "out\n"
    assert "oops" in (tmp_path / "log").read_text()


def test_large_input_and_output_do_not_block() -> None:
    text = "x" * 1_000_000
    assert process.run(["cat"], stdin=text, capture=True).stdout == text


def test_a_failure_carries_status_and_last_lines() -> None:
    with pytest.raises(CommandError) as caught:
        process.run(["sh", "-c", "seq 100; exit 3"])
    assert caught.value.status == 3
    assert caught.value.tail[-1] == "100"
    assert len(caught.value.tail) == process.TAIL_LINES


def test_a_signal_is_told_from_an_exit_status() -> None:
    with pytest.raises(CommandError, match="signal 9"):
        process.run(["sh", "-c", "kill -9 $$"])


def test_a_missing_command_is_named() -> None:
    with pytest.raises(HostError, match="no-such-command"):
        process.run(["no-such-command"])


def test_the_deadline_ends_a_command_that_never_stops_talking() -> None:
    with pytest.raises(DeadlineError):
        process.run(["yes"], deadline=0.3)


def test_standard_input_is_closed() -> None:
    assert process.run(["cat"], capture=True).stdout == ""


def test_the_environment_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in process.run(["env"], capture=True).stdout


def test_ctrl_c_ends_the_command_and_its_children(tmp_path: Path) -> None:
    script = (
        "from vdibuild import process\n"
        f"process.run(['sh', '-c', 'sleep 60 & echo $! > {tmp_path}/pid; wait'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    child = _pid(tmp_path / "pid")
    parent.send_signal(signal.SIGINT)
    parent.wait(10)
    assert wait_gone(child)


@pytest.mark.parametrize("after", ["fork_exec", "signal"])
def test_ctrl_c_while_the_command_is_started_leaves_nothing_of_it(after: str, tmp_path: Path) -> None:
    """It comes when the child is there, and when it is told of but nobody has it yet."""
    script = f"""
import os, signal, sys
from vdibuild import process
forked = False

def interrupt(frame, event, argument):
    global forked
    if event == "c_return":
        forked = forked or argument.__name__ == "fork_exec"
        if forked and argument.__name__ == {after!r}:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(interrupt)
try:
    process.start(["sh", "-c", "echo $$ >{tmp_path}/pid; exec sleep 60"])
except KeyboardInterrupt:
    print("interrupted")
else:
    print("not interrupted")
sys.stdout.flush()
input()
"""
    argv = ["env", "--default-signal=INT", sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "interrupted\n"
        # The child may have been ended before it had written its number.
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        assert children == ""
        parent.communicate("\n")
    if (tmp_path / "pid").exists():
        assert not alive(int((tmp_path / "pid").read_text() or "0"))


def test_kill_9_ends_the_command_too(tmp_path: Path) -> None:
    script = (
        "from vdibuild import process\n"
        f"process.run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    child = _pid(tmp_path / "pid")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    assert wait_gone(child)


def test_a_command_whose_parent_was_killed_before_it_began_does_not_begin(tmp_path: Path) -> None:
    """A setpriv that takes its time: the run is gone before the kernel hears what ends with it."""
    late = tmp_path / "bin" / "setpriv"
    late.parent.mkdir()
    released = tmp_path / "released"
    late.write_text(f"""#!/bin/sh
echo $$ > {tmp_path}/pid
while [ ! -e {released} ]; do sleep 0.02; done
exec {shutil.which("setpriv")} "$@"
""")
    late.chmod(0o755)
    script = (
        f"from vdibuild import process\nprocess.run(['sh', '-c', 'touch {tmp_path}/begun; exec sleep 60'])\n"
    )
    path = f"{late.parent}:{os.environ['PATH']}"
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PATH": path})
    child = _pid(tmp_path / "pid")
    parent.kill()
    parent.wait(10)
    released.touch()
    assert wait_gone(child)
    assert not (tmp_path / "begun").exists()


def _pid(path: Path) -> int:
    for _ in range(200):
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")
