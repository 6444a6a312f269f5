"""What makes a copy of an image a machine of its own: a few files, however they are reached.

Partition and file system UUIDs stay the image's. fstab, boot menu, initramfs and GRUB's core image name
them, so that all of those stay right without a change; and a machine sees no other disks than its own. Only
who attaches two such disks to one machine has to change the UUIDs of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from vdibuild.errors import VdibuildError
from vdibuild.families import Family, systemd
from vdibuild.recipe import NetworkInterface
from vdibuild.tree import Files

_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


@dataclass(frozen=True)
class Identity:
    """A machine's own. host: its name in full. authorized_keys: who may log in as root; none: the image's.
    mac: its interface's address.

    Raises VdibuildError for what would not stay one word or one line of a configuration file.
    """

    host: str
    authorized_keys: Sequence[str]
    interface: NetworkInterface
    mac: str

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host) or len(self.host) > 253:
            raise VdibuildError(f"{self.host!r} is no host name", "lower-case letters, digits, dashes, dots")
        if not _MAC.fullmatch(self.mac):
            raise VdibuildError(f"{self.mac!r} is no MAC address", "write it like 52:54:00:12:34:56")
        for key in self.authorized_keys:
            if len(key.split()) < 2 or not key.strip().isprintable():
                raise VdibuildError(f"{key!r} is no public SSH key", "a line of a .pub file is one")
        addresses = (self.interface.address, self.interface.gateway, *self.interface.nameservers)
        for address in filter(None, addresses):
            try:
                ip_address(address)
            except ValueError:
                raise VdibuildError(f"{address!r} is no address") from None


def write(files: Files, family: Family, identity: Identity) -> None:
    """Give a sealed system its identity; what each machine makes for itself is left to its first boot."""
    systemd.name_host(files, identity.host)
    # Empty: systemd fills it. The keys are made by the image's own unit.
    files.write("/etc/machine-id", "", mode=0o444)
    for pattern in _ANOTHERS:
        for path in files.glob(pattern):
            files.remove(path)
    if identity.authorized_keys:
        files.make_directory("/root/.ssh", mode=0o700)
        text = "".join(f"{key.strip()}\n" for key in dict.fromkeys(identity.authorized_keys))
        files.write("/root/.ssh/authorized_keys", text, mode=0o600)
    if files.exists(_CLOUD):
        # It would configure the network again, for a cloud that is not there.
        files.write(f"{_CLOUD}/99-network.cfg", "network: {config: disabled}\n")
    family.reconnect(files, identity.interface, identity.mac)


_ANOTHERS = (
    "/etc/ssh/ssh_host_*",
    "/var/lib/systemd/random-seed",
    "/etc/udev/rules.d/70-persistent-net.rules",  # names interfaces by the template's MAC addresses
)
"""What belongs to the machine that an image was made of."""

_CLOUD = "/etc/cloud/cloud.cfg.d"
