"""A libvirt of the tests' own: it shares no socket, domain, pool or network with the host's."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from vdibuild import host

_PRIVATE = ("/run/libvirt", "/var/lib/libvirt/qemu", "/var/cache/libvirt", "/etc/libvirt")


@dataclass
class Libvirt:
    """A running libvirt. uri: how it is reached. directory: its files, where its guests can read theirs."""

    uri: str
    directory: Path
    _daemon: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def leftovers(self) -> list[str]:
        """Domains, pools and running guests."""
        with self.connection() as connection:
            found = [f"domain {one.name()}" for one in connection.listAllDomains()]
            found += [f"pool {one.name()}" for one in connection.listAllStoragePools()]
        return found + [f"process {pid}" for pid in self.guests()]

    def guests(self) -> list[int]:
        """The process ids of running QEMUs: those in the PID namespace of the daemon's children."""
        ours = Path(f"/proc/{self._daemon.pid}/ns/pid_for_children").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            # Processes come and go meanwhile.
            with contextlib.suppress(OSError):
                name = (process / "comm").read_text()
                if name.startswith("qemu-system") and (process / "ns" / "pid").readlink() == ours:
                    found.append(int(process.name))
        return found


@contextlib.contextmanager
def system(directory: Path) -> Iterator[Libvirt]:
    """Start libvirtd and virtlogd as root, in a mount namespace with directories of their own."""
    directory.chmod(0o711)
    binds = []
    for place in _PRIVATE:
        own = directory / place[1:].replace("/", "-")
        own.mkdir()
        if place == "/etc/libvirt":
            (own / "qemu.conf").write_text('stdio_handler = "logd"\nnamespaces = []\n')
        binds.append(f"mkdir -p {place} && mount --bind {shlex.quote(str(own))} {place}")
    binds.append(without_kvm(directory))
    sockets = directory / "sockets"
    sockets.mkdir()
    config = directory / "libvirtd.conf"
    config.write_text(f'unix_sock_dir = "{sockets}"\nauth_unix_rw = "none"\nunix_sock_rw_perms = "0777"\n')
    script = f"""
        set -e
        {" && ".join(binds)}
        virtlogd --pid-file {shlex.quote(str(directory / "virtlogd.pid"))} &
        libvirtd --config {shlex.quote(str(config))} --pid-file {shlex.quote(str(directory / "pid"))} &
        # As the first process of its namespace the shell has to bury orphans, such as ended guests.
        wait
    """
    with (directory / "libvirtd.log").open("wb") as log:
        # A PID namespace of its own: its end takes everything with it, running guests too.
        daemon = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        socket = sockets / "libvirt-sock"
        end = time.monotonic() + 60
        while not socket.exists():
            assert daemon.poll() is None and time.monotonic() < end, (directory / "libvirtd.log").read_text()
            time.sleep(0.05)
        yield Libvirt(f"qemu:///system?socket={socket}", directory, daemon)
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def let_in(directory: Path) -> None:
    """Let QEMU, which runs as another user, reach a test's files."""
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
