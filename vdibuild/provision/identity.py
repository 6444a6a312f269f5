"""What makes a copy of an image a machine of its own: a few files, however they are reached.

Partition and file system UUIDs stay the image's. fstab, boot menu, initramfs and GRUB's core image name
them, so that all of those stay right without a change; and a machine sees no other disks than its own. Only
who attaches two such disks to one machine has to change the UUIDs of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdibuild.families import Family, systemd
from vdibuild.recipe import NetworkInterface
from vdibuild.tree import Files


@dataclass(frozen=True)
class Identity:
    """A machine's own. host: its name in full. authorized_keys: who may log in as root; none: the image's."""

    host: str
    authorized_keys: Sequence[str]
    interface: NetworkInterface


def write(files: Files, family: Family, identity: Identity) -> None:
    """Give a sealed system its identity; what each machine makes for itself is left to its first boot."""
    systemd.name_host(files, identity.host)
    # Empty: systemd fills it. The keys are made by the image's own unit.
    files.write("/etc/machine-id", "", mode=0o444)
    for pattern in ("/etc/ssh/ssh_host_*", "/var/lib/systemd/random-seed"):
        for path in files.glob(pattern):
            files.remove(path)
    if identity.authorized_keys:
        files.make_directory("/root/.ssh", mode=0o700)
        text = "".join(f"{key.strip()}\n" for key in dict.fromkeys(identity.authorized_keys))
        files.write("/root/.ssh/authorized_keys", text, mode=0o600)
    family.reconnect(files, identity.interface)
