"""A machine's libvirt domain: its description, our mark on it, and the wait until its guest agent answers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
from pydantic import ValidationError

from vdibuild import domain_template
from vdibuild.errors import HostError, VerificationError
from vdibuild.install import domain as domains
from vdibuild.provision.journal import Made

NAMESPACE = "urn:vdibuild:machine:1"
"""The XML namespace of our mark."""

TEMPLATE = "domain.xml.j2"

_ANSWER_SECONDS = 5
_POLL_SECONDS = 0.25

# What libvirt says when the agent is not there yet, or hangs.
_NO_AGENT = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED)


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of. memory: MiB. volume: its disk, a file or a block device.

    network: of libvirt for the kind nat, of this host for a bridge.
    """

    firmware: Literal["bios", "uefi"]
    accelerator: Literal["kvm", "tcg"]
    memory: int
    cpus: int
    volume: Path
    kind: Literal["nat", "bridge"]
    network: str


@dataclass(frozen=True)
class Answered:
    """What a machine said of itself. seconds: from its start to its answer."""

    host: str
    addresses: tuple[str, ...]
    seconds: float


def describe(made: Made, hardware: Hardware, site_directory: Path) -> str:
    """The domain as libvirt's XML. site_directory: where templates/domain.xml.j2 is looked for first."""
    return domain_template.render(
        TEMPLATE,
        site_directory,
        accelerator=hardware.accelerator,
        firmware=hardware.firmware,
        namespace=NAMESPACE,
        mark=made.model_dump_json(),
        name=made.name,
        uuid=made.uuid,
        image=made.image,
        version=made.version,
        memory=hardware.memory,
        cpus=hardware.cpus,
        block=hardware.volume.is_block_device(),
        volume=hardware.volume,
        interface="network" if hardware.kind == "nat" else "bridge",
        network=hardware.network,
        mac=made.mac,
    )


def mark(domain: Any) -> Made | None:
    """What our mark says of a domain; None for one that is not ours."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0)
        made = Made.model_validate_json(ElementTree.fromstring(text).text or "")  # noqa: S314 (libvirt's)
    except (libvirt.libvirtError, ValidationError):
        return None
    # A copy that somebody made of it under another name keeps the element, and is theirs.
    return made if (made.name, made.uuid) == (domain.name(), domain.UUIDString()) else None


def define(connection: Any, text: str, *, autostart: bool) -> Any:
    """Define a domain. Raises HostError when libvirt refuses."""
    try:
        domain = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        if autostart:
            domain.setAutostart(1)
    except libvirt.libvirtError as error:
        raise HostError(f"libvirt does not define the machine: {error}") from None
    return domain


def start(domain: Any) -> None:
    """Switch it on. Raises HostError when libvirt or QEMU refuses."""
    try:
        domain.create()
    except libvirt.libvirtError as error:
        raise HostError(f"{domain.name()} does not start: {error}") from None


def remove(connection: Any, made: Made) -> None:
    """Switch a machine off and remove its definition; no error when it is gone, or another has its name."""
    domain = domains.find(connection, made.name)
    if domain is not None and domain.UUIDString() == made.uuid:
        domains.remove(domain)


def wait(connection: Any, domain: Any, *, seconds: float, picture: Path) -> Answered:
    """Wait until the guest agent answers and the machine has an address.

    seconds: how long. picture: a file for the screen of one that does not. Raises VerificationError.
    """
    began = time.monotonic()
    host = ""
    while time.monotonic() < began + seconds:
        if not domain.isActive():
            raise VerificationError(f"{domain.name()} ended by itself while it started")
        host = host or _host(domain)
        if host and (addresses := _addresses(domain)):
            return Answered(host, addresses, time.monotonic() - began)
        time.sleep(_POLL_SECONDS)
    what = "has no address" if host else "does not answer"
    shown = domains.screenshot(connection, domain, picture)
    raise VerificationError(
        f"{domain.name()} {what} after {seconds:.0f} s",
        "boot_seconds gives it more time" + (f"; its screen is in {picture}" if shown else ""),
    )


def _host(domain: Any) -> str:
    """The host name that the guest gives itself; empty while its agent does not answer."""
    try:
        answer = libvirt_qemu.qemuAgentCommand(
            domain, json.dumps({"execute": "guest-get-host-name"}), _ANSWER_SECONDS, 0
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() in (*_NO_AGENT, libvirt.VIR_ERR_OPERATION_INVALID):
            return ""
        raise
    return str(json.loads(answer)["return"]["host-name"])


def _addresses(domain: Any) -> tuple[str, ...]:
    """The IPv4 addresses that the guest says it has; without those of itself and of no network."""
    try:
        found = domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT)
    except libvirt.libvirtError:
        return ()
    addresses = [
        address["addr"]
        for interface in found.values()
        for address in interface["addrs"] or ()
        if address["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4
    ]
    return tuple(one for one in addresses if not one.startswith(("127.", "169.254.")))
