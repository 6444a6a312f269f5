"""A libvirt of one's own: it shares no socket, domain, pool, network or process with the host's.

Root is needed. Everything lives in a mount and a PID namespace, and ends with them, running guests too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdibuild import host, process
from vdibuild.errors import DeadlineError, HostError

# /run/lock has the locks of consoles, by the terminal's name and the owner's process id: what a libvirt that
# was killed left there means nothing in another PID namespace, and would be believed.
_PRIVATE = ("/run/libvirt", "/run/lock", "/var/lib/libvirt/qemu", "/var/cache/libvirt", "/etc/libvirt")
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class PrivateLibvirt:
    """A running libvirt. uri: how it is reached. pid: the process that holds its namespaces."""

    uri: str
    pid: int

    def inside(self, argv: Sequence[str]) -> list[str]:
        """A command that runs in libvirt's namespaces, where the paths that it names are what they seem."""
        names = {"mount": "mnt", "pid": "pid_for_children", "net": "net"}
        entered = [f"--{kind}=/proc/{self.pid}/ns/{name}" for kind, name in names.items()]
        return ["nsenter", *entered, "--", *argv]


@contextlib.contextmanager
def running(directory: Path, own_network: bool = False, settings: str = "") -> Iterator[PrivateLibvirt]:
    """Start libvirtd and virtlogd, with their files in a directory, for as long as the block runs.

    own_network: they see no network but one of their own, with nothing in it. settings: lines of qemu.conf.
    Raises HostError when they do not start.
    """
    directory.chmod(0o711)
    sockets = directory / "sockets"
    sockets.mkdir()
    config = directory / "libvirtd.conf"
    config.write_text(f'unix_sock_dir = "{sockets}"\nauth_unix_rw = "none"\nunix_sock_rw_perms = "0777"\n')
    log = directory / "libvirtd.log"
    kinds = ["--mount", "--pid", *(["--net"] if own_network else [])]
    script = _script(directory, config, settings, own_network)
    with log.open("wb") as output:
        daemon = process.start(
            ["unshare", *kinds, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdout=output,
        )
    try:
        socket = sockets / "libvirt-sock"
        uri = f"qemu:///system?socket={socket}"
        end = time.monotonic() + _START_SECONDS
        while not (socket.exists() and _answers(uri, end - time.monotonic())):
            if daemon.poll() is not None or time.monotonic() > end:
                said = " ".join(log.read_text(errors="replace").splitlines()[-5:])
                raise HostError(f"a libvirt of our own does not start: {said}", "root is needed for it")
            time.sleep(_POLL_SECONDS)
        yield PrivateLibvirt(uri, daemon.pid)
    finally:
        process.stop(daemon)


def _answers(uri: str, seconds: float) -> bool:
    """Whether libvirtd has read its settings: its socket is there before, but nobody is let in until then."""
    with contextlib.suppress(DeadlineError):
        return process.run(["virsh", "--connect", uri, "uri"], check=False, deadline=seconds).status == 0
    return False


def let_in(directory: Path) -> None:
    """Let QEMU, which runs as another user, reach the files of a directory of ours."""
    for place in (directory, *directory.parents):
        if place.stat().st_uid == os.geteuid():
            place.chmod(place.stat().st_mode | 0o011)


def without_kvm(directory: Path) -> str:
    """A shell command that hides a /dev/kvm that does not work, in a mount namespace.

    libvirt would find it usable, and QEMU without KVM, and ask QEMU again what it can before each guest: that
    takes most of a minute under emulation. directory: for a file.
    """
    if not Path("/dev/kvm").exists() or host.accelerator().name == "kvm":
        return "true"
    closed = directory / "no-kvm"
    closed.touch(mode=0o600)
    return f"mount --bind {shlex.quote(str(closed))} /dev/kvm"


def _own_interfaces(directory: Path) -> list[str]:
    """Shell commands that show a network namespace its own interfaces in /sys, where libvirt sets up bridges.

    A sysfs shows the interfaces of the namespace that it is mounted in.
    """
    own = directory / "sys"
    own.mkdir()
    commands = ["ip link set lo up", f"mount -t sysfs sysfs {shlex.quote(str(own))}"]
    for place in ("class/net", "devices/virtual/net"):
        commands.append(f"mount --bind {shlex.quote(str(own / place))} /sys/{place}")
    return commands


def _script(directory: Path, config: Path, settings: str, own_network: bool) -> str:
    """What the namespaces' first process does."""
    binds = _own_interfaces(directory) if own_network else []
    for place in _PRIVATE:
        own = directory / place[1:].replace("/", "-")
        own.mkdir()
        if place == "/etc/libvirt":
            lines = f'stdio_handler = "logd"\nnamespaces = []\n{settings}'
            (own / "qemu.conf").write_text(lines)
        binds.append(f"mkdir -p {place} && mount --bind {shlex.quote(str(own))} {place}")
    binds.append(without_kvm(directory))
    return f"""
        set -e
        {" && ".join(binds)}
        virtlogd --pid-file {shlex.quote(str(directory / "virtlogd.pid"))} &
        libvirtd --config {shlex.quote(str(config))} --pid-file {shlex.quote(str(directory / "pid"))} &
        # As the first process of its namespace the shell has to bury orphans, such as ended guests.
        wait
    """
