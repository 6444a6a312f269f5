"""A libvirt of the tests' own, and what is left in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from vdibuild import private_libvirt
from vdibuild.private_libvirt import PrivateLibvirt, let_in, without_kvm

__all__ = ["Libvirt", "let_in", "system", "without_kvm"]


@dataclass
class Libvirt:
    """A running libvirt. uri: how it is reached. directory: its files, where its guests can read theirs."""

    uri: str
    directory: Path
    _private: PrivateLibvirt
    _restarted: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def inside(self, argv: Sequence[str] = ()) -> list[str]:
        """A command that runs where libvirt's paths are what they seem; without one, what runs it there."""
        return self._private.inside(argv)

    def leftovers(self) -> list[str]:
        """Domains, pools and running guests."""
        with self.connection() as connection:
            found = [f"domain {one.name()}" for one in connection.listAllDomains()]
            found += [f"pool {one.name()}" for one in connection.listAllStoragePools()]
        return found + [f"process {pid}" for pid in self.guests()]

    def guests(self) -> list[int]:
        """The process ids of running QEMUs."""
        return self._processes("qemu-system")

    def kill_daemon(self) -> None:
        """Kill libvirtd; its guests run on."""
        for pid in self._processes("libvirtd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_daemon(self) -> None:
        """Start libvirtd again, where and as it was started first."""
        config, pid_file = (str(self.directory / name) for name in ("libvirtd.conf", "pid"))
        argv = self.inside(["libvirtd", "--config", config, "--pid-file", pid_file])
        with (self.directory / "libvirtd.log").open("ab") as log:
            self._restarted.append(
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            )

    def close(self) -> None:
        """Bury the daemons that were started again, once their namespace has ended."""
        for daemon in self._restarted:
            daemon.wait()

    def _processes(self, name: str) -> list[int]:
        """Processes by the beginning of their name, in the PID namespace of the daemon's children."""
        ours = Path(f"/proc/{self._private.pid}/ns/pid_for_children").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            # Processes come and go meanwhile.
            with contextlib.suppress(OSError):
                called = (process / "comm").read_text()
                if called.startswith(name) and (process / "ns" / "pid").readlink() == ours:
                    found.append(int(process.name))
        return found


@contextlib.contextmanager
def system(directory: Path, *, own_network: bool = False) -> Iterator[Libvirt]:
    """Start libvirtd and virtlogd as root, in namespaces with directories of their own.

    own_network: in a network namespace too, where libvirt may make networks.
    """
    with private_libvirt.running(directory, own_network) as private:
        found = Libvirt(private.uri, directory, private)
        yield found
    found.close()
