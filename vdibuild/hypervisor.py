"""Sets up the host of a pool: the stations' DHCP, time and firewall, libvirt's networks for machines, and the
pools' units of systemd.

    /etc/dnsmasq.d/vdibuild-stations.conf     DHCP for stations, and this host's names
    CONFDIR/vdibuild-stations.conf            in a directory that chrony reads (confdir): time for stations
    /etc/vdibuild/firewall.nft                what stations reach of this host
    /etc/systemd/system/vdibuild-firewall.service
    /etc/systemd/system/vdibuild-pool@.service, vdibuild-relay@.service, vdibuild-relay@.socket
    /etc/sysusers.d/vdibuild.conf, /etc/tmpfiles.d/vdibuild.conf      who the units run as

All of it is rendered from templates, and looked at by the program that will read it, before
anything is changed. What is as it should be is left alone, so that a second run has nothing to do. Files that
are not named here are never touched.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from vdibuild import config_template, process
from vdibuild.errors import CommandError, HostError, VdibuildError
from vdibuild.libvirt_connection import connected
from vdibuild.output import replace
from vdibuild.pool import firewall
from vdibuild.settings.hypervisor import LibvirtNetwork, StationNetwork, address_range
from vdibuild.settings.pools import Pool
from vdibuild.site import Site

_DNSMASQ = Path("etc/dnsmasq.d/vdibuild-stations.conf")
_CHRONY = "vdibuild-stations.conf"
_FIREWALL = Path("etc/vdibuild/firewall.nft")
_UNITS = Path("etc/systemd/system")
_UNIT = _UNITS / "vdibuild-firewall.service"
_POOL_UNITS = ("vdibuild-pool@.service", "vdibuild-relay@.service", "vdibuild-relay@.socket")
_USERS = Path("etc/sysusers.d/vdibuild.conf")
_DIRECTORIES = Path("etc/tmpfiles.d/vdibuild.conf")
_QEMU_GROUPS = ("libvirt-qemu", "qemu")  # of Debian, of Red Hat

_CHRONY_CONFIGURATIONS = (Path("etc/chrony/chrony.conf"), Path("etc/chrony.conf"))

_CHECKS = {
    "dnsmasq.conf.j2": ("dnsmasq", "--test", "-C"),
    "chrony.conf.j2": ("chronyd", "-p", "-f"),
    "firewall.nft.j2": ("nft", "--check", "--file"),
}
"""The programs that read the configurations, when they only look at one."""


@dataclass(frozen=True)
class Change:
    """Something that is not as it should be. what: a line about it. difference: what changes, as `diff -u`
    shows it. make: makes it so, and returns what a person still has to do, empty for nothing.
    """

    what: str
    difference: str
    make: Callable[[], str]


def changes(site: Site, root: Path = Path("/")) -> list[Change]:
    """What has to be changed on this host, in the order in which it has to be.

    root: where the host's files are. Raises HostError when the host lacks something, VdibuildError when a
    program refuses what its template makes.
    """
    wanted = site.hypervisor
    found = [
        change
        for name, network in wanted.networks.items()
        if (change := _network_change(site, name, network))
    ]
    if wanted.stations:
        _check_interface(wanted.stations)
        found += _file_changes(site, wanted.stations, root)
    if wanted.units:
        found += _unit_changes(site, root)
    return found


def configurations(site: Site, stations: StationNetwork) -> dict[str, str]:
    """The files of the stations' network, as text, by their templates' names."""
    first, last = address_range(stations.address, stations.first, stations.last)
    listening = [
        (name, pool)
        for name, pool in site.pools.items()
        if pool.listen.is_unspecified or pool.listen == stations.address.ip
    ]
    names = {
        *stations.names,
        *(pool.desk.host for _, pool in listening if pool.desk and not _numeric(pool.desk.host)),
    }
    values = {
        "interface": stations.interface,
        "address": stations.address.ip,
        "network": stations.address.network,
        "first": first,
        "last": last,
        "names": sorted(names),
        "sources": stations.time,
        "pools": [(name, _ports(pool)) for name, pool in listening],
        "administrators": stations.administrators,
    }
    templates = ("dnsmasq.conf.j2", "chrony.conf.j2", "firewall.nft.j2", "vdibuild-firewall.service")
    return {
        name: config_template.render(f"hypervisor/{name}", site.directory, **values) for name in templates
    }


def network_xml(site: Site, name: str, network: LibvirtNetwork, uuid: str = "") -> str:
    """A network of libvirt, as its XML. uuid: of the one that it replaces."""
    values: dict[str, object] = {"first": None, "last": None}
    if network.address:
        values["first"], values["last"] = address_range(network.address, network.first, network.last)
    return config_template.render(
        "hypervisor/network.xml.j2",
        site.directory,
        name=name,
        uuid=uuid,
        kind=network.kind,
        bridge=network.bridge,
        address=network.address,
        **values,
    )


def _ports(pool: Pool) -> list[int]:
    ports = {pool.signal_port, pool.spice_port}
    if pool.desk:
        ports |= {pool.desk.port, pool.desk.tls_port}
    return sorted(port for port in ports if port)


def _numeric(host: str) -> bool:
    try:
        IPv4Address(host)
    except ValueError:
        return ":" in host
    return True


def _check_interface(stations: StationNetwork) -> None:
    there = [f"{one.name} {address}" for one in firewall.host_interfaces() for address in one.addresses]
    if f"{stations.interface} {stations.address}" not in there:
        raise HostError(
            f"the interface {stations.interface} does not have the address {stations.address}",
            f"give it that address in this host's network configuration; there are: {', '.join(there)}",
        )


def _file_changes(site: Site, stations: StationNetwork, root: Path) -> list[Change]:
    texts = configurations(site, stations)
    for name, argv in _CHECKS.items():
        _check(name, texts[name], argv)
    places = {
        "dnsmasq.conf.j2": (root / _DNSMASQ, "dnsmasq"),
        "chrony.conf.j2": (_chrony_directory(root) / _CHRONY, "chronyd"),
        "firewall.nft.j2": (root / _FIREWALL, "vdibuild-firewall"),
        "vdibuild-firewall.service": (root / _UNIT, "vdibuild-firewall"),
    }
    found = []
    restarted = {service: False for _, service in places.values()}
    for name, (path, service) in places.items():
        if change := _file_change(path, texts[name]):
            found.append(change)
            restarted[service] = True
    for service, changed in restarted.items():
        if changed or not _runs(service, root):
            found.append(_service_change(service, root))
    return found


def _unit_changes(site: Site, root: Path) -> list[Change]:
    texts = {root / _UNITS / name: config_template.render(name, site.directory) for name in _POOL_UNITS}
    users = config_template.render("hypervisor/sysusers.conf.j2", site.directory, qemu=_qemu_group(root))
    directories = config_template.render("hypervisor/tmpfiles.conf.j2", site.directory)
    texts |= {root / _USERS: users, root / _DIRECTORIES: directories}
    found = [change for path, text in texts.items() if (change := _file_change(path, text))]

    def apply() -> str:
        process.run(["systemd-sysusers", str(root / _USERS)])
        process.run(["systemd-tmpfiles", "--create", str(root / _DIRECTORIES)])
        if _has_systemd(root):
            process.run(["systemctl", "daemon-reload"])
        return "systemctl enable --now vdibuild-pool@NAME starts a pool"

    return (
        [*found, Change("make the units' users, and have systemd read the units", "", apply)] if found else []
    )


def _qemu_group(root: Path) -> str:
    """The group that libvirt's QEMU has. Raises HostError."""
    lines = (root / "etc/group").read_text(encoding="utf-8").splitlines()
    there = {line.partition(":")[0] for line in lines}
    for name in _QEMU_GROUPS:
        if name in there:
            return name
    raise HostError("this host has no group of QEMU's", "install libvirt-daemon-system (libvirt-daemon-qemu)")


def _check(name: str, text: str, argv: Sequence[str]) -> None:
    """Let the program that will read a configuration look at it. Raises VdibuildError when it refuses it."""
    with tempfile.NamedTemporaryFile("w", suffix=f"-{name.removesuffix('.j2')}") as file:
        file.write(text)
        file.flush()
        try:
            process.run([*argv, file.name])
        except CommandError as error:
            raise VdibuildError(
                f"{argv[0]} refuses what templates/hypervisor/{name} makes: {' '.join(error.tail[-2:])}",
                "see hypervisor: in the site file, and the template",
            ) from None


def _chrony_directory(root: Path) -> Path:
    """Where chrony reads further files (chrony.conf(5): confdir). Raises HostError."""
    for configuration in _CHRONY_CONFIGURATIONS:
        if not (root / configuration).exists():
            continue
        text = (root / configuration).read_text(encoding="utf-8")
        match = re.search(r"^\s*confdir\s+/(\S+)", text, re.MULTILINE)
        if match:
            return root / match[1]
        raise HostError(
            f"{root / configuration} names no directory for further files",
            "add a line: confdir /etc/chrony.d; and make that directory",
        )
    raise HostError("chrony is not installed", "install the package chrony")


def _file_change(path: Path, after: str) -> Change | None:
    """What makes a file hold that text; None where it does."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before == after:
        return None

    def write() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, after)
        return ""

    return Change(f"write {path}", _difference(path.name, before, after), write)


def _service_change(service: str, root: Path) -> Change:
    def start() -> str:
        if not _has_systemd(root):
            return f"this host has no systemd: start {service} anew yourself"
        process.run(["systemctl", "daemon-reload"])
        process.run(["systemctl", "restart", service])
        if process.run(["systemctl", "is-enabled", "--quiet", service], check=False).status != 0:
            process.run(["systemctl", "enable", service])
        return ""

    return Change(f"start {service} anew, and whenever this host starts", "", start)


def _runs(service: str, root: Path) -> bool:
    """Whether a service is active, as far as that can be asked."""
    return (
        not _has_systemd(root)
        or process.run(["systemctl", "is-active", "--quiet", service], check=False).status == 0
    )


def _has_systemd(root: Path) -> bool:
    """Whether systemd runs this host (sd_booted(3))."""
    return (root / "run/systemd/system").is_dir()


def _network_change(site: Site, name: str, network: LibvirtNetwork) -> Change | None:
    if network.bridge and network.bridge not in _bridges():
        raise HostError(f"there is no bridge {network.bridge} for the network {name}", "make it first")
    with connected(site.libvirt) as connection:
        there = _network(connection, name)
        before = there.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE) if there and there.isPersistent() else ""
        after = network_xml(site, name, network, there.UUIDString() if there else "")
        defined = bool(before) and _essence(before) == _essence(after)
        if there and defined and there.isActive() and there.autostart():
            return None
    if before and not defined and (entries := _entries(before)):
        raise HostError(
            f"the network {name} is to become another one, and knows the machines {', '.join(entries)}",
            "deprovision them first, or leave its description as it is",
        )

    def make() -> str:
        with connected(site.libvirt) as connection:
            made = _network(connection, name) if defined else connection.networkDefineXML(after)
            made.setAutostart(1)
            if not made.isActive():
                made.create()
            elif not defined:
                return f"when no machine is on it: virsh net-destroy {name} && virsh net-start {name}"
        return ""

    difference = "" if defined else _difference(f"{name}.xml", before and _essence(before), _essence(after))
    return Change(f"have libvirt's network {name}, started with this host", difference, make)


def _network(connection: Any, name: str) -> Any:
    """libvirt's network of that name, or None."""
    try:
        return connection.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise


def _essence(xml: str) -> str:
    """A network's XML without what libvirt chooses by itself (UUID, MAC address, the name of its bridge), and
    without machines' entries (see provision.network).
    """
    root = ElementTree.fromstring(xml)  # noqa: S314 (libvirt's, or ours)
    for path, tag in ((".", "uuid"), (".", "mac"), (".", "dns"), ("ip/dhcp", "host")):
        for parent in root.findall(path):
            for element in parent.findall(tag):
                parent.remove(element)
    bridge = root.find("bridge")
    forward = root.find("forward")
    if bridge is not None and (forward is None or forward.get("mode") != "bridge"):
        bridge.attrib.pop("name", None)
    ElementTree.indent(root)
    return ElementTree.canonicalize(ElementTree.tostring(root, encoding="unicode")) + "\n"


def _entries(xml: str) -> list[str]:
    """The addresses of machines that a network knows."""
    root = ElementTree.fromstring(xml)  # noqa: S314 (libvirt's)
    return sorted({one.get("ip", "") for path in ("ip/dhcp/host", "dns/host") for one in root.iterfind(path)})


def _bridges() -> set[str]:
    return {path.parent.name for path in Path("/sys/class/net").glob("*/bridge")}


def _difference(name: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, name)
    return "".join(lines)
