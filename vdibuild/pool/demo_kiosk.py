"""A station of the demo that starts from the kiosk's ISO, as a machine on the demo's network.

A DHCP server of its own gives it an address, and says where the pool is: the ISO is as it was published.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import libvirt

from vdibuild import domain_template, process, station
from vdibuild.install import domain as domains
from vdibuild.libvirt_connection import connected
from vdibuild.private_libvirt import PrivateLibvirt

TEMPLATE = "demo-kiosk.xml.j2"

_DHCP_OPTION = 224  # in which a station looks for settings (station.py)
_ENTER = 28  # KEY_ENTER, include/uapi/linux/input-event-codes.h
_HELD_MILLISECONDS = 100


@dataclass(frozen=True)
class KioskStation:
    """A running one. address: what it gets by DHCP. console: the file of its serial port."""

    name: str
    address: str
    uri: str
    console: Path

    def is_up(self) -> bool:
        """Whether its first screen was shown."""
        return self._says(station.UP)

    def begins(self) -> bool:
        """Press a key until it knows that somebody is there; returns whether it does."""
        if self._says("the viewer begins"):
            return True
        with connected(self.uri) as connection:
            domain = connection.lookupByName(self.name)
            domain.sendKey(libvirt.VIR_KEYCODE_SET_LINUX, _HELD_MILLISECONDS, [_ENTER], 1, 0)
        return False

    def picture(self, file: Path) -> bool:
        """Save its screen as PNG; returns False when that cannot be had."""
        with connected(self.uri) as connection:
            return domains.screenshot(connection, connection.lookupByName(self.name), file)

    def _says(self, text: str) -> bool:
        return text in self.console.read_text(errors="replace")


@contextlib.contextmanager
def started(
    system: PrivateLibvirt,
    iso: Path,
    *,
    memory: int,
    accelerator: Literal["kvm", "tcg"],
    bridge: str,
    server: str,
    address: str,
    directory: Path,
) -> Iterator[KioskStation]:
    """Start it for as long as the block runs.

    memory: MiB. accelerator: see host.accelerator. bridge: a network of the libvirt's namespace, where the
    pool is at the address `server`. directory: gets what it says.
    """
    made = KioskStation("kiosk", address, system.uri, directory / "kiosk.console")
    made.console.touch()
    text = domain_template.render(
        TEMPLATE,
        directory,
        accelerator=accelerator,
        firmware="bios",
        name=made.name,
        memory=memory,
        iso=iso.resolve(),
        bridge=bridge,
        console=made.console,
    )
    argv = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--port=0",
        "--user=root",
        "--pid-file=",
    ]
    argv += [f"--interface={bridge}", "--bind-interfaces", "--leasefile-ro", "--dhcp-authoritative"]
    argv += [f"--dhcp-range={address},{address},1h"]
    argv += [f"--dhcp-option-force={_DHCP_OPTION},server_ip={server}"]
    with contextlib.ExitStack() as stack, (directory / "kiosk.dhcp").open("wb") as log:
        dhcp = process.start(
            ["nsenter", f"--net=/proc/{system.pid}/ns/net", "--", *argv], stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(process.stop, dhcp)
        with connected(system.uri) as connection:
            connection.createXML(text)
        stack.callback(_destroy, made)
        yield made


def _destroy(kiosk: KioskStation) -> None:
    with connected(kiosk.uri) as connection, contextlib.suppress(libvirt.libvirtError):
        connection.lookupByName(kiosk.name).destroy()
