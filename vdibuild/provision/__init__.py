"""A machine up in seconds: an image's system on a volume of libvirt's, as a machine of its own.

    plan      what is wanted, against what libvirt has: nothing that exists is ever overwritten
    trust     the image's signature and bytes, before one of them is used
    make      volume, system on it, entries in DHCP and DNS, domain; each written down before it is made
    start     and wait for the guest agent, where that is asked for

Whatever fails, or is interrupted, all of it is taken back; what a killed run left, the next one takes back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal

import libvirt

from vdibuild import host, progress
from vdibuild.errors import BusyError, HostError, InputError, VdibuildError
from vdibuild.install import domain as domains
from vdibuild.install import storage
from vdibuild.libvirt_connection import connected
from vdibuild.provision import domain, journal, names, network, sources, ways
from vdibuild.provision.anew import Disk
from vdibuild.provision.domain import Answered, Hardware
from vdibuild.provision.identity import Identity
from vdibuild.provision.journal import DnsEntry, Journal, Made, Part
from vdibuild.provision.network import Entry
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.provision.sources import Source
from vdibuild.provision.ways import Placement, Way
from vdibuild.recipe import NetworkInterface
from vdibuild.scratch import beside
from vdibuild.settings.machines import Machine, MachineNetwork
from vdibuild.site import Site
from vdibuild.store import Store

_MIB = 1 << 20


@dataclass(frozen=True)
class Provisioned:
    """A new machine. way: how its volume was made. answered: what it said of itself, where it was asked."""

    made: Made
    way: Way
    answered: Answered | None


def provision(site: Site, name: str, machine: Machine, *, start: bool, wait: bool) -> Provisioned:
    """Make a machine. start: switch it on. wait: until its guest agent answers.

    Raises VdibuildError for a name, address or volume that is taken, HostError for what the host lacks,
    StoreError for an image that is not as it was signed, VerificationError when the machine does not answer:
    nothing is left of it then.
    """
    _check_name(name)
    state = _state(site)
    with connected(site.libvirt) as connection:
        _recover(connection, site.libvirt, state)
        with (
            journal.opened(state, name) as record,
            sources.opened(site, machine) as source,
            _whole(connection, record),
            progress.step(f"machine {name}"),
        ):
            return _Run(site, connection, record, state, name, machine, source).run(start=start, wait=wait)


def deprovision(site: Site, name: str) -> Made:
    """Remove a machine that `provision` made: its domain, entries and volume. Returns what it was.

    Raises VdibuildError when there is no such machine, or it is not ours.
    """
    _check_name(name)
    state = _state(site)
    with connected(site.libvirt) as connection, progress.step(f"remove machine {name}"):
        _recover(connection, site.libvirt, state)
        with journal.opened(state, name) as record:
            found = domains.find(connection, name)
            if found is None:
                raise VdibuildError(f"there is no machine {name} on {site.libvirt}", "`virsh list --all`")
            made = domain.mark(found)
            if made is None:
                raise VdibuildError(
                    f"the machine {name} was not made by `provision`",
                    f"remove it with virsh: undefine {name}",
                )
            # From here on a killed run is gone on with by the next one.
            record.write(made)
            _undo(connection, made)
            record.forget()
    return made


@dataclass(frozen=True)
class _Plan:
    """All that is decided before anything is made."""

    way: Way
    made: Made
    identity: Identity
    entry: Entry | None


@dataclass
class _Run:
    """One run, with the lock of the machine's name."""

    site: Site
    connection: Any
    record: Journal
    state: Path
    name: str
    machine: Machine
    source: Source

    def run(self, *, start: bool, wait: bool) -> Provisioned:
        with self._choosing():
            plan = self._plan()
            # Nothing is made yet, but whoever chooses an address now leaves ours alone.
            self.record.write(plan.made)
        self._trust(plan)
        self._make(plan)
        answered = self._start(plan, start, wait)
        self.record.forget()
        return Provisioned(plan.made, plan.way, answered)

    # What is decided

    def _plan(self) -> _Plan:
        settings, machine = self.site.network(self.machine.network), self.machine
        if domains.find(self.connection, self.name) is not None:
            raise VdibuildError(
                f"there is a machine {self.name} on {self.site.libvirt} already",
                f"`./inv deprovision {self.name}` removes one that `provision` made",
            )
        if self.record.read() is not None:
            raise VdibuildError(
                f"what an earlier run made of {self.name} could not be taken back yet",
                "see the warning above",
            )
        disk = Disk(machine.filesystem or "ext4", machine.swap or 0) if machine.new_disk else None
        way = ways.choose(self.source, machine.size, disk)
        pool = storage.opened(self.connection, machine.pool)
        volume = storage.file_name(pool, self.name)
        if storage.find(self.connection, machine.pool, volume) is not None:
            raise VdibuildError(
                f"there is a volume {volume} in the pool {machine.pool} already",
                f"virsh vol-delete --pool {machine.pool} {volume} removes it, if nobody needs it",
            )
        self._check_room(pool, way)
        address = self._address(settings)
        full = f"{self.name}.{settings.domain}" if settings.domain else self.name
        made = Made(
            name=self.name,
            uuid=str(uuid.uuid4()),
            uri=self.site.libvirt,
            image=self.source.name,
            version=self.source.version,
            pool=machine.pool,
            volume=volume,
            network=settings.name if settings.kind == "nat" else "",
            mac=_mac(machine, address),
            address=str(address or ""),
            host=full,
            dns=_dns(settings, full, address),
        )
        entry = None
        if settings.kind == "nat":
            net = network.opened(self.connection, settings.name)
            if address:
                entry = Entry(settings.name, made.mac, full, address)
                network.check(net, entry)
        elif not Path(f"/sys/class/net/{settings.name}/bridge").exists():
            raise HostError(f"there is no bridge {settings.name}", "`ip link show type bridge` shows them")
        if made.dns:
            names.check(made.dns)
        identity = Identity(full, machine.authorized_keys, _interface(settings, address), made.mac)
        progress.note(f"{way.name} ({way.by}): {way.reason}")
        return _Plan(way, made, identity, entry)

    def _check_room(self, pool: Any, way: Way) -> None:
        available = pool.info()[3]
        wanted = ways.needed(self.source, way)
        if wanted > available:
            raise HostError(
                f"the pool {pool.name()} has {available // _MIB} MiB left, the system needs {wanted // _MIB}",
                "free some space, or name another pool",
            )

    def _address(self, settings: MachineNetwork) -> IPv4Address | None:
        wanted = self.machine.address
        if wanted == "dhcp":
            return None
        if wanted != "next":
            if not isinstance(wanted, IPv4Address):
                raise TypeError(f"{wanted!r} is no address")
            return wanted
        if settings.first is None or settings.last is None:
            raise InputError(
                self.site.source, None, f"networks.{self.machine.network}: has no first and last address"
            )
        taken = {IPv4Address(made.address) for made in self._others() if made.address}
        if settings.kind == "nat":
            taken |= network.taken(network.opened(self.connection, settings.name))
        if settings.gateway:
            taken.add(settings.gateway)
        return network.choose(settings.first, settings.last, taken)

    def _others(self) -> Iterator[Made]:
        """The machines that `provision` made on this libvirt, and those it is making."""
        for one in self.connection.listAllDomains():
            if made := domain.mark(one):
                yield made
        yield from journal.under_way(self.state)

    def _trust(self, plan: _Plan) -> None:
        self.source.trust(archive=plan.way.name == "unpack")

    # What is made

    def _make(self, plan: _Plan) -> None:
        accelerator: Literal["kvm", "tcg"] = host.accelerator(cache=self.site.cache_directory).name
        made = self._write_down(plan.made, "volume")
        with progress.step("make the volume"):
            pool = storage.opened(self.connection, made.pool)
            volume = storage.make(pool, made.volume, plan.way.layout.size)
        with beside(_work(self.state, self.name)) as scratch:
            Placement(
                self.source,
                plan.way,
                volume.path,
                _size(volume.path),
                plan.identity,
                scratch,
                self.site.directory,
                accelerator,
                PreparedDisks(self.site.cache_directory / "disks", self._store),
            ).put()
        if plan.entry:
            made = self._write_down(made, "network")
            with progress.step(f"enter it in the network {plan.entry.network}"):
                network.enter(self.connection, plan.entry)
        if dns := made.dns:
            made = self._write_down(made, "dns")
            with progress.step(f"enter it in {dns.zone}"):
                names.enter(dns)
        made = self._write_down(made, "domain")
        settings, machine = self.site.network(self.machine.network), self.machine
        hardware = Hardware(
            "uefi" if plan.way.layout.firmware == "uefi" else "bios",
            accelerator,
            machine.memory,
            machine.cpus,
            volume.path,
            settings.kind,
            settings.name,
        )
        with progress.step("define the machine"):
            text = domain.describe(made, hardware, self.site.directory)
            domain.define(self.connection, text, autostart=machine.autostart)

    def _start(self, plan: _Plan, start: bool, wait: bool) -> Answered | None:
        if not start:
            return None
        found = domains.find(self.connection, self.name)
        with progress.step("start"):
            domain.start(found)
        if not wait:
            return None
        with progress.step("wait until it answers"):
            picture = self.state / f"{self.name}.png"
            return domain.wait(self.connection, found, seconds=self.machine.boot_seconds, picture=picture)

    @property
    def _store(self) -> Store:
        return Store(self.site.artifacts_directory, self.site.keys)

    def _write_down(self, made: Made, part: Part) -> Made:
        made = made.model_copy(update={"parts": (*made.parts, part)})
        self.record.write(made)
        return made

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """Hold the lock under which addresses are chosen."""
        with (self.state / "addresses.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _whole(connection: Any, record: Journal) -> Iterator[None]:
    """Leave a whole machine or nothing of it: an interrupt can come when its journal is forgotten already."""
    try:
        yield
    except BaseException:
        if (made := record.written) is not None:
            with progress.step("take back what was made"):
                if record.read() is None:
                    record.write(made)
                _take_back(connection, record, made)
        raise


def _undo(connection: Any, made: Made) -> None:
    """Take back all the parts of a machine that there are, the last first."""
    if "domain" in made.parts:
        domain.remove(connection, made)
    if "dns" in made.parts and made.dns:
        names.leave(made.dns)
    if "network" in made.parts:
        network.leave(connection, Entry(made.network, made.mac, made.host, IPv4Address(made.address)))
    if "volume" in made.parts and (volume := storage.find(connection, made.pool, made.volume)):
        storage.delete(volume)


def _take_back(connection: Any, record: Journal, made: Made) -> None:
    """Take back what a journal names, as far as that can be done now."""
    try:
        _undo(connection, made)
    except (VdibuildError, libvirt.libvirtError) as error:
        progress.warn(f"not all of {made.name} could be taken back, the next run tries again: {error}")
    else:
        record.forget()


def _recover(connection: Any, uri: str, state: Path) -> None:
    """Take back what killed runs left on this libvirt."""
    for name in journal.unfinished(state):
        with contextlib.suppress(BusyError), journal.opened(state, name) as record:
            made = record.read()
            if made is not None and made.uri == uri:
                progress.warn(f"taking back the machine {name}, which a run left half-done")
                _take_back(connection, record, made)
                with beside(_work(state, name)):
                    pass  # what the killed run left there is removed


def _work(state: Path, name: str) -> Path:
    """Beside which a run has its temporary files."""
    return state / f"{name}.work"


def _state(site: Site) -> Path:
    return site.artifacts_directory / ".machines"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise VdibuildError(
            f"{name!r} is no name for a machine",
            "it is its host name too: lower-case letters, digits and dashes inside, at most 63",
        )


def _mac(machine: Machine, address: IPv4Address | None) -> str:
    """The machine's MAC address: as given, of its address, or at random among QEMU's own."""
    if machine.mac:
        return machine.mac
    if address:
        return network.mac_of(address)
    return ":".join(["52", "54", "00", *(f"{byte:02x}" for byte in secrets.token_bytes(3))])


def _dns(settings: MachineNetwork, full: str, address: IPv4Address | None) -> DnsEntry | None:
    dns = settings.dns
    if dns is None:
        return None
    if address is None:
        raise VdibuildError(
            "a name server is told of machines with an address of their own", "give one, or `--address next`"
        )
    return DnsEntry(
        server=str(dns.server),
        port=dns.port,
        zone=dns.zone,
        reverse=dns.reverse or "",
        key=str(dns.key),
        name=full,
        address=str(address),
        ttl=dns.ttl,
    )


def _interface(settings: MachineNetwork, address: IPv4Address | None) -> NetworkInterface:
    """How the machine configures its interface: libvirt's networks give it even a fixed address by DHCP."""
    if settings.kind == "nat" or address is None:
        return NetworkInterface("link", 0)
    return NetworkInterface(
        "link",
        0,
        address=str(address),
        prefix=settings.prefix,
        gateway=str(settings.gateway) if settings.gateway else None,
        nameservers=tuple(str(server) for server in settings.nameservers),
    )


def _size(volume: Path) -> int:
    """Whole MiB of a volume, which may be larger than asked for."""
    if not volume.exists():
        raise HostError(
            f"the volume {volume} is not on this host", "provision works on the hypervisor itself"
        )
    with volume.open("rb") as file:
        return file.seek(0, os.SEEK_END) // _MIB
