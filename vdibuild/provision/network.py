"""libvirt's networks: which addresses are free, and a machine's entries in their DHCP and DNS servers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any
from xml.etree import ElementTree

import libvirt

from vdibuild.errors import HostError, VdibuildError


@dataclass(frozen=True)
class Entry:
    """A machine in a network. network: libvirt's name of it. host: the machine's name in full."""

    network: str
    mac: str
    host: str
    address: IPv4Address


def opened(connection: Any, name: str) -> Any:
    """The network of that name. Raises HostError when there is none, or it is not started."""
    try:
        network = connection.networkLookupByName(name)
    except libvirt.libvirtError:
        known = ", ".join(one.name() for one in connection.listAllNetworks()) or "none"
        raise HostError(
            f"there is no network {name} on {connection.getURI()}", f"there are: {known}"
        ) from None
    if not network.isActive():
        raise HostError(f"the network {name} is not started", f"virsh net-start {name}")
    return network


def choose(first: IPv4Address, last: IPv4Address, taken: Collection[IPv4Address]) -> IPv4Address:
    """The first free address of a range. Raises VdibuildError when there is none."""
    for number in range(int(first), int(last) + 1):
        if IPv4Address(number) not in taken:
            return IPv4Address(number)
    raise VdibuildError(
        f"all addresses from {first} to {last} are taken", "deprovision a machine, or widen the range"
    )


def mac_of(address: IPv4Address) -> str:
    """The MAC address that is made from an IPv4 address: 192.168.122.4 gives 52:54:c0:a8:7a:04."""
    return ":".join(["52", "54", *(f"{byte:02x}" for byte in address.packed)])


def taken(network: Any, mac: str = "") -> set[IPv4Address]:
    """The addresses that a network has given away: its own, reserved ones, leases.

    A lease of `mac`, or of the MAC address that is made from it, is of a machine that is gone: its
    reservation would be there.
    """
    root = _described(network)
    found = {element.get("address") for element in root.iterfind("ip")}
    found |= {element.get("ip") for element in root.iterfind("ip/dhcp/host")}
    found |= {element.get("ip") for element in root.iterfind("dns/host")}
    addresses = {IPv4Address(address) for address in found if address and ":" not in address}
    for lease in network.DHCPLeases():
        if lease["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4:
            address = IPv4Address(lease["ipaddr"])
            if lease["mac"].lower() not in (mac, mac_of(address)):
                addresses.add(address)
    return addresses


def check(network: Any, entry: Entry) -> None:
    """Raise VdibuildError for an entry that does not fit into the network, or that others have."""
    subnets = _subnets(network)
    if not any(entry.address in subnet for subnet in subnets):
        there = ", ".join(map(str, subnets)) or "no IPv4"
        raise VdibuildError(f"{entry.address} is not in the network {entry.network}", f"it has {there}")
    if entry.address in taken(network, entry.mac):
        raise VdibuildError(
            f"the address {entry.address} is taken in the network {entry.network}",
            "give another one, or `--address next`",
        )
    root = _described(network)
    names = {element.text for element in root.iterfind("dns/host/hostname")}
    names |= {element.get("name") for element in root.iterfind("ip/dhcp/host")}
    if names & set(_names(entry)):
        raise VdibuildError(f"the name {entry.host} is taken in the network {entry.network}")
    if entry.mac in {(element.get("mac") or "").lower() for element in root.iterfind("ip/dhcp/host")}:
        raise VdibuildError(f"the MAC address {entry.mac} is taken in the network {entry.network}")


def enter(connection: Any, entry: Entry) -> None:
    """Let the network's servers know a machine. Raises HostError when libvirt refuses."""
    network = opened(connection, entry.network)
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
    flags |= libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG if network.isPersistent() else 0
    try:
        for section, text in _elements(entry):
            network.update(libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, section, -1, text, flags)
    except libvirt.libvirtError as error:
        raise HostError(f"the network {entry.network} does not take {entry.host}: {error}") from None


def leave(connection: Any, entry: Entry) -> None:
    """Let the network's servers forget a machine; no error when they do not know it."""
    try:
        network = connection.networkLookupByName(entry.network)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return
        raise
    places = [(libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG, True)] if network.isPersistent() else []
    places += [(libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE, False)] if network.isActive() else []
    for flag, persistent in places:
        # Who was ended in between may have left it in one of them.
        root = _described(network, persistent=persistent)
        for section, text in _elements(entry):
            if _holds(root, section, entry):
                network.update(libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, section, -1, text, flag)


def _holds(root: ElementTree.Element, section: int, entry: Entry) -> bool:
    """Whether a network's description has a machine's element, and not another's, in a section."""
    address = str(entry.address)
    if section == libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST:
        found = [(one.get("mac"), one.get("ip")) for one in root.iterfind("ip/dhcp/host")]
        return (entry.mac, address) in found
    hosts = [one for one in root.iterfind("dns/host") if one.get("ip") == address]
    return any(entry.host == name.text for one in hosts for name in one.iterfind("hostname"))


def _subnets(network: Any) -> list[IPv4Network]:
    found = []
    for element in _described(network).iterfind("ip"):
        if element.get("family", "ipv4") == "ipv4" and element.get("address"):
            length = element.get("prefix") or element.get("netmask")
            found.append(IPv4Interface(f"{element.get('address')}/{length}").network)
    return found


def _names(entry: Entry) -> list[str]:
    return list(dict.fromkeys((entry.host, entry.host.partition(".")[0])))


def _elements(entry: Entry) -> list[tuple[int, str]]:
    """The machine's elements in the network's description, by section."""
    address = str(entry.address)
    lease = ElementTree.Element("host", mac=entry.mac, name=entry.host.partition(".")[0], ip=address)
    names = ElementTree.Element("host", ip=address)
    for name in _names(entry):
        ElementTree.SubElement(names, "hostname").text = name
    return [
        (libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, ElementTree.tostring(lease, encoding="unicode")),
        (libvirt.VIR_NETWORK_SECTION_DNS_HOST, ElementTree.tostring(names, encoding="unicode")),
    ]


def _described(network: Any, *, persistent: bool = False) -> ElementTree.Element:
    inactive = libvirt.VIR_NETWORK_XML_INACTIVE if persistent and network.isPersistent() else 0
    return ElementTree.fromstring(network.XMLDesc(inactive))  # noqa: S314 (libvirt's own output)
