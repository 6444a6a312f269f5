"""A systemd in namespaces of its own, beside a libvirt of the tests' own, and the units that it runs.

It is the real one, as PID 1, with a control group of its own, and it does to a unit all that its file says.
It knows no units but ours: what they want of the host is there by name only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest.libvirtd import Libvirt

STATE = Path("/var/lib/vdibuild")
CONFIGURATION = Path("/etc/vdibuild")
PROJECT = Path(__file__).parents[2]

_HOSTS = ("sysinit", "basic", "shutdown", "sockets", "multi-user", "network-online", "vdibuild-test")
_GROUPS = Path("/sys/fs/cgroup")
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Systemd:
    """A running systemd. pid: its process here."""

    pid: int

    def inside(self, *argv: str) -> list[str]:
        """A command that runs where its units do."""
        kinds = ("--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup")
        return ["nsenter", f"--target={self.pid}", *kinds, "--", *argv]

    def run(self, *argv: str) -> str:
        """What a command there prints; it has to succeed."""
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def main(self, unit: str) -> int:
        """The process id of a unit's main process, there; 0 while it has none."""
        return int(self.run("systemctl", "show", "--property=MainPID", "--value", unit))

    def status(self, unit: str) -> dict[str, str]:
        """What the kernel says of a unit's main process (proc_pid_status(5))."""
        lines = self.run("cat", f"/proc/{self.main(unit)}/status").splitlines()
        return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


@contextlib.contextmanager
def running(system: Libvirt, directory: Path, site: Path) -> Iterator[Systemd]:
    """Run systemd for as long as the block runs.

    directory: becomes STATE, in libvirt's namespace too. site: becomes CONFIGURATION. Changes in the rest of
    /etc are its own. libvirt is where it is on any host, for its group; the program of the units is this
    project's. What units say is in the file `said` of the directory.
    """
    directory.chmod(0o755)
    (directory / "said").touch()
    made = not STATE.exists()
    STATE.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        if made:
            stack.callback(STATE.rmdir)
        prepared = _prepared(directory, system.directory)
        subprocess.run(system.inside(["sh", "-ec", prepared]), check=True)
        group = stack.enter_context(_control_group())
        enter = f'echo 0 >{group}/cgroup.procs; exec "$@"'
        kinds = ("--pid", "--mount", "--cgroup", "--uts", "--ipc")
        argv = ["sh", "-c", enter, "sh", "unshare", "--fork", *kinds, "--kill-child", "--mount-proc"]
        script = _script(system.directory / "sockets", site)
        with (directory / "systemd.log").open("wb") as log:
            process = subprocess.Popen(
                system.inside([*argv, "sh", "-c", script]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        stack.callback(_end, process)
        yield _started(process, directory / "systemd.log")


def _prepared(state: Path, libvirt: Path) -> str:
    """What libvirt sees too: the pools' directory; and users, for it asks who somebody is that connects."""
    return f"""
        mount --bind {state} {STATE}
        mkdir {libvirt}/etc
        mount -t tmpfs tmpfs {libvirt}/etc
        mkdir {libvirt}/etc/upper {libvirt}/etc/work
        mount -t overlay overlay -o lowerdir=/etc,upperdir={libvirt}/etc/upper,workdir={libvirt}/etc/work /etc
        mkdir -p /etc/libvirt
        mount --bind {libvirt}/etc-libvirt /etc/libvirt
    """


def _script(sockets: Path, site: Path) -> str:
    """What becomes systemd."""
    stubs = "\n".join(
        f"printf '[Unit]\\nDefaultDependencies=no\\n' >/run/own/{name}.target" for name in _HOSTS
    )
    groups = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    if not (_GROUPS / "cgroup.controllers").exists():
        groups = """
            mount -t tmpfs tmpfs /sys/fs/cgroup
            mkdir /sys/fs/cgroup/systemd
            mount -t cgroup -o none,name=systemd systemd /sys/fs/cgroup/systemd
        """
    program = f'exec /opt/python/bin/{Path(sys.executable).name} -c "$program" "$@"'
    return f"""
        set -e
        mount --make-rprivate /
        umount --recursive /sys/fs/cgroup
        {groups}
        mount -t tmpfs tmpfs /run
        mkdir /run/libvirt /run/own /run/own/service.d
        mount --bind {sockets} /run/libvirt
        chown root:libvirt /run/libvirt/libvirt-sock
        chmod 770 /run/libvirt/libvirt-sock
        mount -t tmpfs tmpfs /etc/systemd/system
        mkdir -p {CONFIGURATION}
        mount --bind {site} {CONFIGURATION}
        mount -t tmpfs tmpfs /opt
        mkdir /opt/project /opt/python
        mount --bind {PROJECT} /opt/project
        mount --bind {sys.prefix} /opt/python
        mount -t tmpfs tmpfs /usr/local/bin
        cat >/usr/local/bin/vdibuild <<'END'
#!/bin/sh
export PYTHONPATH=/opt/project PYTHONDONTWRITEBYTECODE=1
program='from vdibuild.console import program; program.run()'
{program}
END
        chmod 755 /usr/local/bin/vdibuild
        {stubs}
        printf '[Service]\\nStandardOutput=append:{STATE}/said\\nStandardError=inherit\\n' \\
            >/run/own/service.d/said.conf
        export container=test SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/own
        exec /lib/systemd/systemd --system --unit=vdibuild-test.target --log-target=console
    """


@contextlib.contextmanager
def _control_group() -> Iterator[Path]:
    """A control group for systemd alone, which makes its units' ones within it."""
    top = _GROUPS if (_GROUPS / "cgroup.controllers").exists() else _GROUPS / "systemd"
    group = top / f"vdibuild-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for place in sorted([group, *(path for path in group.rglob("*") if path.is_dir())], reverse=True):
            place.rmdir()


def _started(process: subprocess.Popen[bytes], log: Path) -> Systemd:
    """The systemd that a process starts below it, once it answers."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for started in _below(process.pid):
            answer = started.inside("systemctl", "is-active", "vdibuild-test.target")
            if subprocess.run(answer, capture_output=True, check=False).stdout == b"active\n":
                return started
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace"))


def _below(pid: int) -> list[Systemd]:
    """What runs as systemd below a process."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
            return [Systemd(pid)]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [found for child in children for found in _below(int(child))]
    return []


def _end(process: subprocess.Popen[bytes]) -> None:
    for found in _below(process.pid):
        # It alone removes its units' directories in /tmp.
        with contextlib.suppress(subprocess.TimeoutExpired):
            stopped = found.inside("systemctl", "stop", "vdibuild-*.socket", "vdibuild-*.service")
            subprocess.run(stopped, check=False, timeout=_STOP_SECONDS)
        os.kill(found.pid, signal.SIGKILL)  # and everything in its namespace with it
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
