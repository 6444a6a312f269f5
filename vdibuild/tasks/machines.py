"""Tasks that make machines on a hypervisor, and remove them."""

from __future__ import annotations

from invoke.context import Context
from rich.markup import escape

from vdibuild.tasks.command import SITE, command, load_site, out

_MACHINE = {
    "name": "the machine's name; what the site file says of it in machines: is taken",
    "image": "the image it is a copy of",
    "version": "the image's version; by default the promoted one",
    "bundle": "instead of an image: a bundle of the repository that the site file names",
    "storage": "the libvirt storage pool that gets its volume",
    "size": "of its disk, such as 20GiB; by default the image's",
    "filesystem": "ext4, xfs or btrfs for /, on a disk that is laid out anew",
    "swap": "such as 1GiB, on a disk that is laid out anew",
    "memory": "such as 2GiB",
    "cpus": "how many processors",
    "network": "a network of the site file",
    "address": "its IPv4 address; next: the first free one; dhcp: any",
    "mac": "its MAC address; by default made from the address",
    "autostart": "start it whenever its host starts",
    "start": "switch it on (--no-start leaves that out)",
    "wait": "wait until its guest agent answers",
}


@command(_MACHINE, positional=["name"])
def provision(
    context: Context,
    name: str,
    image: str = "",
    version: str = "",
    bundle: str = "",
    storage: str = "",
    size: str = "",
    filesystem: str = "",
    swap: str = "",
    memory: str = "",
    cpus: int = 0,
    network: str = "",
    address: str = "",
    mac: str = "",
    autostart: bool = False,
    start: bool = True,
    wait: bool = False,
    site: str = SITE,
) -> None:
    """Make a machine from an image or a bundle: volume, network entries, domain."""
    from vdibuild import provision

    loaded = load_site(site)
    given = {
        "image": image,
        "version": version,
        "bundle": bundle,
        "pool": storage,
        "size": size,
        "filesystem": filesystem,
        "swap": swap,
        "memory": memory,
        "cpus": cpus,
        "network": network,
        "address": address,
        "mac": mac,
        "autostart": autostart,
    }
    machine = loaded.machine(name, {key: value for key, value in given.items() if value})
    done = provision.provision(loaded, name, machine, start=start, wait=wait)
    made = done.made
    out.print(
        f"{name}: {made.image} {made.version}, volume {made.volume} in {made.pool}, MAC {made.mac}"
        + (f", address {made.address}" if made.address else ""),
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"  {done.way.name} ({done.way.by}): {done.way.reason}", highlight=False, soft_wrap=True)
    if answered := done.answered:
        said = f"{answered.host} answers at {', '.join(answered.addresses)} after {answered.seconds:.0f} s"
        out.print(f"  {escape(said)}", highlight=False)


@command({"name": "the machine's name"}, positional=["name"])
def deprovision(context: Context, name: str, site: str = SITE) -> None:
    """Remove a machine that `provision` made, with all that is on its disk."""
    from vdibuild import provision

    made = provision.deprovision(load_site(site), name)
    out.print(f"{name} is gone, with its volume {made.volume} in {made.pool}", highlight=False)
