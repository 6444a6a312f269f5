"""The site file `vdibuild.yaml` as typed models: every setting has one home, a default and a sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, time
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from vdibuild import site_windows
from vdibuild.errors import InputError, VdibuildError

DEFAULT_NAME = "vdibuild.yaml"

_Any = TypeVar("_Any", bound=BaseModel)

INSTALLER = "installer"
"""The name under which versions of the installer are kept."""

KIOSK = "kiosk"
"""The name under which versions of the kiosk are kept."""

_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def _mebibytes(value: object) -> object:
    """A size such as 8GiB, 512M or 1.5 TiB, in MiB; a bare number is refused: of what?"""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"give a unit with the size: {value}MiB or {value}GiB")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is no size; write it like 8GiB or 512MiB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size != int(size) or size < 1:
        raise ValueError(f"{value!r} is not a whole number of MiB")
    return int(size)


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError(f"{value!r} is no name: lower-case letters, digits, dots, dashes, at most 63")
    return value


def _bundle_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError(f"{value!r} is no name of a bundle: letters, digits, dots, dashes, at most 63")
    return value


def _mac(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise ValueError(f"{value!r} is no MAC address; write it like 52:54:c0:a8:7a:04")
    if int(value[:2], 16) & 1:
        raise ValueError(f"{value!r} is a multicast address: the first byte of a machine's own is even")
    return value.lower()


def _domain(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*", value):
        raise ValueError(f"{value!r} is no domain: lower-case letters, digits, dashes and dots")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("is no SHA-256: 64 hexadecimal digits, as sha256sum prints them")
    return value.lower()


def _time(value: object) -> object:
    """A time of the day; YAML reads 08:00 without quotes as a number, which is nobody's meaning."""
    if not isinstance(value, str) or not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
        raise ValueError(f'{value!r} is no time of the day; write it like "08:00", with the quotes')
    return time.fromisoformat(value)


Size = Annotated[
    int,
    BeforeValidator(_mebibytes, json_schema_input_type=str),
]
Name = Annotated[str, AfterValidator(_name)]
BundleName = Annotated[str, AfterValidator(_bundle_name)]
Mac = Annotated[str, AfterValidator(_mac)]
Sha256 = Annotated[str, AfterValidator(_sha256)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Disk(_Model):
    """The disk of an image."""

    size: Size = Field(default="4GiB", validate_default=True)
    """Size of the disk as a guest sees it, such as 8GiB."""
    layout: str = "plain-ext4"
    """Which partitions: the name of a file in kickstarts/layouts, without its ending."""
    table: Literal["gpt", "msdos"] = "gpt"
    """The partition table."""


class Network(_Model):
    """The network of a machine."""

    kind: Literal["user", "nat", "bridge"] = "user"
    """user: QEMU's own, which needs no set-up; nat: a network of libvirt; bridge: a bridge of this host."""
    name: str = "default"
    """The name of libvirt's network, or of the bridge."""
    address: IPv4Address | None = None
    """The machine's IPv4 address; its MAC address is made from it: 192.168.122.4 gives 52:54:c0:a8:7a:04."""
    mac: Mac | None = None
    """The machine's MAC address; by default made from the address, or by libvirt."""

    @property
    def hardware_address(self) -> str | None:
        """The MAC address: the given one, or 52:54 and the four bytes of the IPv4 address."""
        if self.mac or self.address is None:
            return self.mac
        return ":".join(["52", "54", *(f"{byte:02x}" for byte in self.address.packed)])


class Install(_Model):
    """How an installer is run in a guest."""

    location: str | None = None
    """The medium: an ISO by path (relative to the site file) or URL, or the URL of an installation tree."""
    sha256: Sha256 | None = None
    """SHA-256 of the ISO; needed where it is downloaded."""
    kernel: str | None = None
    """The installer's kernel: a path in the ISO or the tree where there is a location, else on this host."""
    initrd: str | None = None
    """The installer's initramfs, likewise."""
    arguments: list[str] = Field(default_factory=list)
    """More arguments for the installer's kernel, such as inst.sshd."""
    osinfo: str | None = None
    """The system's name for virt-install (`virt-install --osinfo list`); by default found on the medium."""
    pool: str | None = None
    """The libvirt storage pool (dir or logical) for the disk; by default a file among the build's own."""
    network: Network = Field(default_factory=Network)
    """The network of the guest."""
    memory: Size = Field(default="3GiB", validate_default=True)
    """Memory of the guest that installs; Fedora and EL want 3GiB."""
    cpus: Annotated[int, Field(gt=0)] = 2
    """Processors of the guest that installs; one where it is emulated."""
    deadline_seconds: Annotated[int, Field(gt=0)] = 7200
    """How long an installation may take."""
    silence_seconds: Annotated[int, Field(gt=0)] = 900
    """How long the installer may say nothing, neither on its console nor in its log."""
    keep: bool = False
    """Leave the machine and its disk defined in libvirt after the installation; needs a pool."""
    autostart: bool = False
    """Start the machine that is kept whenever its host starts."""

    @model_validator(mode="after")
    def _consistent(self) -> Install:
        if (self.kernel is None) != (self.initrd is None):
            raise ValueError("kernel and initrd go together")
        if self.location and not self.sha256 and downloaded(self.location):
            raise ValueError("an ISO that is downloaded needs its sha256")
        if self.keep and not self.pool:
            raise ValueError("keep needs a pool for the disk to stay in")
        if self.autostart and not self.keep:
            raise ValueError("autostart is for a machine that is kept")
        return self


def downloaded(location: str) -> bool:
    """Whether an installer's location is an ISO that has to be downloaded (a tree is read in place)."""
    return bool(re.match(r"https?://", location)) and location.partition("?")[0].endswith(".iso")


class System(_Model):
    """A system that is made of packages: what golden images and live systems have in common."""

    family: Literal["debian", "redhat", "windows"]
    """The family of systems: debian (also Ubuntu), redhat (Fedora, EL), or windows."""
    release: str
    """The release: a Debian or Ubuntu code name such as trixie; fedora43, el9, el10; win10 or win11."""
    kickstart: str = ""
    """The recipe: a file in kickstarts/. Windows has none."""
    variables: dict[str, str | int | bool | list[str]] = Field(default_factory=dict)
    """Values for the recipe's own variables."""
    packages: list[str] = Field(default_factory=list)
    """Packages to install in addition to the recipe's."""
    overlays: list[str] = Field(default_factory=list)
    """File trees to lay over the system, in this order: directories in overlays/."""
    authorized_keys: list[str] = Field(default_factory=list)
    """Public SSH keys that may log in as root."""
    playbook: Path | None = None
    """An Ansible playbook that configures the system; relative to the site file."""
    mirror: str | None = None
    """Where packages come from; by default what this host's own package manager uses. A Debian archive's URL;
    for redhat the directory that holds `releases` and `updates` (Fedora), `BaseOS` and `AppStream` (EL)."""
    security_mirror: str | None = None
    """Where Debian's security updates come from; by default this host's, else none."""
    components: list[str] = Field(default_factory=lambda: ["main"])
    """Components of a Debian archive, such as main or non-free-firmware."""
    keyring: Path | None = None
    """Keys that sign the repositories, relative to the site file; by default those this host has."""


class Image(System):
    """A golden image."""

    method: Literal["bootstrap", "install", "adopt"] = "bootstrap"
    """How it is made: bootstrap (no installer), install (the system's own installer, in a machine), or adopt
    (a machine that somebody else made, see images.adopt)."""
    install: Install = Field(default_factory=Install)
    """For the method install: the medium, by default our own installer, and the machine it runs in."""
    bundle: Name | None = None
    """For the method install: the image whose bundle the kickstart's liveimg unpacks."""
    windows: site_windows.Windows | None = None
    """For the family windows: what its answer file says."""
    firmware: Literal["bios", "uefi"] = "bios"
    """What the machine boots with."""
    disk: Disk = Field(default_factory=Disk)
    """The disk: size, layout, partition table."""
    memory: Size = Field(default="1GiB", validate_default=True)
    """Memory of the machine that verifies the image, such as 2GiB."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long the image may take until it answers when it is verified."""

    @model_validator(mode="after")
    def _consistent(self) -> Image:
        if self.method == "adopt":
            known = {"family", "release", "method"}
            for name in sorted(self.model_fields_set - known):
                raise ValueError(f"{name}: is not for the method adopt, which takes a machine as it is")
        elif self.family == "windows":
            site_windows.check(self)
        elif self.windows:
            raise ValueError(f"windows: has no meaning for the family {self.family}")
        elif not self.kickstart:
            raise ValueError("kickstart: is missing: the recipe, a file in kickstarts/")
        elif self.method == "bootstrap":
            for name in ("install", "bundle"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name}: is for the method install")
        elif self.family == "redhat" and not (self.install.location or self.install.kernel):
            raise ValueError("install: give the location of the installer's medium, or kernel and initrd")
        return self


class Compression(_Model):
    """How the root file system of a live system is compressed."""

    method: Literal["zstd", "xz"] = "zstd"
    """zstd, which is fast, or xz, which is smaller by a tenth and slower to read."""
    level: Annotated[int, Field(ge=1, le=22)] = 15
    """The level of zstd: 1 is quick, 22 small."""


class LiveSystem(System):
    """A system that runs from an ISO, and forgets everything when it is switched off."""

    family: Literal["debian", "redhat"]
    """The family of distributions: debian (also Ubuntu), or redhat (Fedora, EL)."""
    kickstart: str
    """The recipe: a file in kickstarts/."""
    compression: Compression = Field(default_factory=Compression)
    """How its root file system is compressed."""
    memory: Size = Field(default="1GiB", validate_default=True)
    """Memory of the machine that verifies it, such as 2GiB."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long it may take until it is up when it is verified."""


class Installer(LiveSystem):
    """The live system that installs others by their kickstarts; works as it is."""

    family: Literal["debian"] = "debian"
    """The family of distributions that it is made of."""
    release: str = "trixie"
    """The release that it is made of; what it installs may be another one."""
    kickstart: str = "installer-debian.ks.j2"
    """The recipe: a file in kickstarts/."""
    overlays: list[str] = Field(default_factory=lambda: ["installer"])
    """File trees to lay over the system, in this order: directories in overlays/."""
    compression: Compression = Field(default_factory=lambda: Compression(level=3))
    """How its root file system is compressed; by default quickly, as it is used on the host that makes it."""


class Kiosk(LiveSystem):
    """The live system of stations, which reach the pool and nothing else; works as it is."""

    family: Literal["debian", "redhat"] = "debian"
    """The family of distributions that it is made of; redhat needs a release and a kickstart of its own, such
    as fedora43 and kiosk-fedora.ks.j2."""
    release: str = "trixie"
    """The release that it is made of."""
    kickstart: str = "kiosk-debian.ks.j2"
    """The recipe: a file in kickstarts/."""
    overlays: list[str] = Field(default_factory=lambda: ["kiosk"])
    """File trees to lay over the system, in this order: directories in overlays/."""
    settings: dict[str, str] = Field(default_factory=dict)
    """What client.conf on the card says at first, such as server_ip; kiosk.configure changes it later."""
    check: Literal["medium", "verity"] | None = None
    """How a station knows that its card is as it was made. medium: all of it is compared with its digests at
    every start, which takes a while. verity: each block is compared with its hash whenever it is read. By
    default neither is done."""


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = get_args(Day)


class Hours(_Model):
    """Hours of the week in which another number of machines is kept ready."""

    days: list[Day] = Field(default_factory=lambda: list(_DAYS))
    """The days, such as [mon, tue]; by default all."""
    begin: Annotated[time, BeforeValidator(_time)] = Field(alias="from")
    """When it begins, by this host's clock, such as "08:00"."""
    end: Annotated[time, BeforeValidator(_time)] = Field(alias="to")
    """When it ends, such as "18:00"; "00:00" is the end of the day."""
    clean: Annotated[int, Field(ge=0)]
    """How many clean machines are kept ready."""

    def hold(self, moment: datetime) -> bool:
        """Whether it is that time."""
        if _DAYS[moment.weekday()] not in self.days:
            return False
        return self.begin <= moment.time() and (self.end == time() or moment.time() < self.end)

    @model_validator(mode="after")
    def _in_order(self) -> Hours:
        if self.end != time() and self.end <= self.begin:
            raise ValueError("the end is not after the beginning; give two entries for a night")
        return self


class Desk(_Model):
    """Where stations that are known by a token or a certificate get a .vv file, by HTTPS."""

    port: Annotated[int, Field(ge=0, le=65535)] = 5908
    """The port."""
    certificate: Path
    """This host's certificate and those that lead to the CA, PEM; relative to the site file."""
    key: Path
    """The certificate's private key, PEM."""
    ca: Path
    """The CA's certificate, which stations check the relay's by, PEM."""
    host: str
    """The name of this host in the relay's certificate, by which stations find it."""
    tls_port: Annotated[int, Field(ge=1, le=65535)] = 5907
    """The relay's port for TLS."""
    stations: Path = Path("stations")
    """The known stations, as pool.enrol writes them."""
    client_ca: Path | None = None
    """The CA of stations that have certificates."""


Port = Annotated[int, Field(ge=1, le=65535)]


class Reach(_Model):
    """Something that a pool's machines may reach; without ports, by whatever protocol."""

    address: IPv4Network
    """An address, or a network such as 10.20.0.0/16; only an address of its own opens this host."""
    tcp: list[Port] = Field(default_factory=list)
    """TCP ports, such as [3128]."""
    udp: list[Port] = Field(default_factory=list)
    """UDP ports, such as [53]."""


class Pool(_Model):
    """A pool of one-time machines, all clones of one image."""

    image: Name
    """The golden image."""
    clean: Annotated[int, Field(ge=0)] = 2
    """How many clean machines are kept ready."""
    hours: list[Hours] = Field(default_factory=list)
    """Hours of the week in which that number is another one; the first that holds counts."""
    maximum: Annotated[int, Field(ge=1)] = 8
    """How many machines there may be, those in use included."""
    memory: Size = Field(default="2GiB", validate_default=True)
    """Memory of a machine."""
    cores: Annotated[int, Field(ge=1)] = 2
    """Processors of a machine."""
    disk: Size = Field(default="4GiB", validate_default=True)
    """How much a machine may write before it is destroyed."""
    video: Literal["virtio", "qxl"] = "virtio"
    """The graphics card."""
    network: str | None = None
    """The libvirt network of the machines; without it they have none."""
    reach: list[Reach] = Field(default_factory=list)
    """What they may reach, such as a proxy and DNS: by default nothing, neither this host nor each other."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long a machine may take until its guest agent answers."""
    offer_seconds: Annotated[int, Field(ge=2, le=600)] = 10
    """How long a station has to connect to the machine it was offered."""
    session_minutes: Annotated[int, Field(gt=0)] | None = None
    """How long a session may last, by default for ever; the station is warned five minutes before its end."""
    idle_minutes: Annotated[int, Field(gt=0)] | None = None
    """How long nobody may touch keyboard and mouse, by default for ever; a warning comes a minute before."""
    directory: Path = Path("/var/lib/vdibuild/pools")
    """Where machines and leases are kept, in a directory for each pool; relative to the site file."""
    database: str | None = None
    """Where leases are kept, as a SQLAlchemy URL; by default in SQLite, in the pool's directory."""
    relay: Path = Path("relay.sock")
    """The control socket of the relay, which carries SPICE between stations and machines; relative to the
    pool's directory.
    """
    listen: IPvAnyAddress = Field(default="0.0.0.0", validate_default=True)  # noqa: S104 (stations are elsewhere)
    """The address of this host in the stations' network."""
    signal_port: Annotated[int, Field(ge=0, le=65535)] = 5905
    """The port on which old clients wait for a machine."""
    spice_port: Annotated[int, Field(ge=1, le=65535)] | None = 5906
    """The port on which they then see it, without TLS; null for none."""
    desk: Desk | None = None
    """Where known stations get a .vv file; by default nowhere."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The port, on 127.0.0.1 only, of /metrics for Prometheus; by default none."""
    waiting_per_address: Annotated[int, Field(ge=1)] = 8
    """How many stations may wait at one address: more than one only where stations share an address."""
    reserve_memory: Size = Field(default="1GiB", validate_default=True)
    """Memory that machines leave to the host."""
    reserve_disk: Size = Field(default="2GiB", validate_default=True)
    """Space that machines leave free."""

    @model_validator(mode="after")
    def _has_a_way_in(self) -> Pool:
        if self.spice_port is None and self.desk is None:
            raise ValueError("without spice_port and desk no station can see a machine")
        if self.reach and self.network is None:
            raise ValueError("without a network machines reach nothing: give network, or leave out reach")
        return self

    def clean_at(self, moment: datetime) -> int:
        """How many clean machines are kept ready at that time."""
        return next((hours.clean for hours in self.hours if hours.hold(moment)), self.clean)


class DnsUpdate(_Model):
    """A name server that takes updates (RFC 2136), signed with a TSIG key."""

    server: IPvAnyAddress
    """The address of the zone's primary server."""
    port: Annotated[int, Field(ge=1, le=65535)] = 53
    """Its port."""
    zone: str
    """The zone that gets the machines' names, such as example.org."""
    reverse: str | None = None
    """The zone that gets their addresses, such as 122.168.192.in-addr.arpa; by default none does."""
    key: Path
    """The file with the TSIG key, as tsig-keygen writes it; relative to the site file."""
    ttl: Annotated[int, Field(ge=0)] = 3600
    """How many seconds others may remember a name."""


class MachineNetwork(_Model):
    """A network that machines are on."""

    kind: Literal["nat", "bridge"] = "nat"
    """nat: a network of libvirt, whose DHCP and DNS know each machine; bridge: a bridge of this host."""
    name: str = "default"
    """The name of libvirt's network, or of the bridge."""
    first: IPv4Address | None = None
    """The first of the addresses that `address: next` gives out."""
    last: IPv4Address | None = None
    """The last of them."""
    prefix: Annotated[int, Field(ge=1, le=32)] = 24
    """The length of the network's prefix; libvirt's networks say their own."""
    gateway: IPv4Address | None = None
    """The way out, for machines on a bridge with an address of their own."""
    nameservers: list[IPvAnyAddress] = Field(default_factory=list)
    """Whom they ask for names."""
    domain: str = ""
    """The domain of their names, such as example.org."""
    dns: DnsUpdate | None = None
    """A name server to enter machines with; by default only libvirt's own knows them."""

    @field_validator("domain")
    @classmethod
    def _is_domain(cls, domain: str) -> str:
        return _domain(domain) if domain else ""

    @model_validator(mode="after")
    def _range(self) -> MachineNetwork:
        if (self.first is None) != (self.last is None):
            raise ValueError("first and last go together")
        if self.first and self.last and self.last < self.first:
            raise ValueError("the last address is before the first")
        return self


class Machine(_Model):
    """A machine that `provision` makes."""

    image: Name | None = None
    """The image it is a copy of."""
    version: str | None = None
    """The image's version; by default the promoted one."""
    bundle: BundleName | None = None
    """Instead of an image: a bundle in the repository `bundles`."""
    pool: str = "default"
    """The libvirt storage pool (dir or logical) that gets its volume."""
    size: Size | None = None
    """Size of its disk; by default that of the image, or of the disk that the bundle was made of."""
    filesystem: Literal["ext4", "xfs", "btrfs"] | None = None
    """A new file system for /, on a disk that is laid out anew; by default the disk stays as it was."""
    swap: Size | None = None
    """Swap on a disk that is laid out anew."""
    memory: Size = Field(default="1GiB", validate_default=True)
    """Its memory."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """Its processors."""
    network: Name = "default"
    """The network it is on: a name in networks."""
    address: IPv4Address | Literal["dhcp", "next"] = "dhcp"
    """Its IPv4 address; next: the first that is free between the network's first and last; dhcp: any."""
    mac: Mac | None = None
    """Its MAC address; by default made from its address, else at random."""
    authorized_keys: list[str] = Field(default_factory=list)
    """Public SSH keys that may log in as root; by default those of the image."""
    autostart: bool = False
    """Start it whenever its host starts."""
    boot_seconds: Annotated[int, Field(gt=0)] = 300
    """How long it may take until its guest agent answers, where that is waited for."""

    @property
    def new_disk(self) -> bool:
        """Whether its disk is laid out anew."""
        return self.filesystem is not None or self.swap is not None

    @field_validator("authorized_keys")
    @classmethod
    def _one_line_each(cls, keys: list[str]) -> list[str]:
        for key in keys:
            if len(key.split()) < 2 or not key.strip().isprintable():
                raise ValueError(f"{key!r} is no public SSH key: a line of a .pub file is one")
        return keys

    @model_validator(mode="after")
    def _of_one_thing(self) -> Machine:
        if (self.image is None) == (self.bundle is None):
            raise ValueError("a machine is a copy of an image, or made of a bundle: name one of the two")
        if self.bundle and self.version:
            raise ValueError("a bundle has no versions: its name says which it is")
        return self


class StationNetwork(_Model):
    """The network of the stations."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")]
    """This host's interface in it, such as enp5s0."""
    address: IPv4Interface
    """This host's address in it, such as 10.20.0.1/24, which its own network configuration gives it."""
    first: IPv4Address | None = None
    """The first of the addresses that stations get; by default the network's tenth."""
    last: IPv4Address | None = None
    """The last of them; by default the network's last."""
    names: list[Annotated[str, AfterValidator(_domain)]] = Field(default_factory=list)
    """Names by which stations find this host; those of the pools' desks are known without."""
    time: list[Annotated[str, AfterValidator(_domain)]] = Field(default_factory=list)
    """Time servers for this host; by default those it has."""
    administrators: list[IPv4Network] = Field(default_factory=list)
    """Who in this network may reach this host by SSH; by default nobody."""

    @model_validator(mode="after")
    def _range(self) -> StationNetwork:
        _check_range(self.address, self.first, self.last)
        return self


class LibvirtNetwork(_Model):
    """A network of libvirt for machines."""

    kind: Literal["nat", "isolated", "bridge"] = "nat"
    """nat: behind this host's address; isolated: they reach at most this host; bridge: on a bridge it has."""
    bridge: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    """For the kind bridge: its name."""
    address: IPv4Interface | None = None
    """Else this host's address in it, such as 10.30.0.1/24."""
    first: IPv4Address | None = None
    """The first of the addresses that machines get; by default the network's tenth."""
    last: IPv4Address | None = None
    """The last of them; by default the network's last."""

    @model_validator(mode="after")
    def _consistent(self) -> LibvirtNetwork:
        if (self.bridge is not None) != (self.kind == "bridge"):
            raise ValueError("bridge: goes with the kind bridge")
        if (self.address is None) != (self.kind == "bridge"):
            raise ValueError("address: goes with the kinds nat and isolated")
        if self.address:
            _check_range(self.address, self.first, self.last)
        elif self.first or self.last:
            raise ValueError("first and last: on a bridge somebody else gives addresses")
        return self


class Hypervisor(_Model):
    """What hypervisor.setup makes of this host."""

    stations: StationNetwork | None = None
    """The network of the stations; without it there are no DHCP, time and firewall for them."""
    networks: dict[Name, LibvirtNetwork] = Field(default_factory=dict)
    """Networks of libvirt for machines, by name."""
    units: bool = False
    """Whether systemd gets the pools' units, and the users that they run as."""


def _check_range(address: IPv4Interface, first: IPv4Address | None, last: IPv4Address | None) -> None:
    begin, end = address_range(address, first, last)
    for one in (begin, end):
        if one not in address.network:
            raise ValueError(f"{one} is not in {address.network}")
    if end < begin:
        raise ValueError(f"there is nothing between {begin} and {end}")


def address_range(
    address: IPv4Interface, first: IPv4Address | None, last: IPv4Address | None
) -> tuple[IPv4Address, IPv4Address]:
    """The first and the last address that a network gives away."""
    network = address.network
    return first or network.network_address + 10, last or network.broadcast_address - 1


class Keys(_Model):
    """Who signs images, and whose signatures count."""

    signing: Path = Path("~/.config/vdibuild/signing_key")
    """The private key that signs versions; made on first use."""
    identity: str = "vdibuild"
    """The name under which this key signs."""
    allowed_signers: list[str] = Field(default_factory=list)
    """Further keys that count, in ssh-keygen's allowed_signers form: NAME KEYTYPE KEY."""


class Site(_Model):
    """A site: its images, and where things live."""

    images: dict[Name, Image] = Field(min_length=1)
    """The golden images, by name."""
    installer: Installer = Field(default_factory=Installer)
    """The installer ISO."""
    kiosk: Kiosk = Field(default_factory=Kiosk)
    """The ISO of stations."""
    pools: dict[Name, Pool] = Field(default_factory=dict)
    """The pools of one-time machines, by name."""
    networks: dict[Name, MachineNetwork] = Field(default_factory=lambda: {"default": MachineNetwork()})
    """The networks that machines are on, by name."""
    machines: dict[Name, Machine] = Field(default_factory=dict)
    """Machines that `provision` makes, by name."""
    bundles: str | None = None
    """The repository of bundles: a directory, relative to the site file, or an http or https URL."""
    hypervisor: Hypervisor = Field(default_factory=Hypervisor)
    """What hypervisor.setup makes of this host."""
    artifacts: Path = Path("artifacts")
    """Where what was built is kept; relative to the site file."""
    cache: Path | None = None
    """Where downloads and finished steps are kept; by default in the artifacts directory."""
    libvirt: str = "qemu:///system"
    """The libvirt connection."""
    keys: Keys = Field(default_factory=Keys)
    """Signing keys."""

    @field_validator("images")
    @classmethod
    def _no_live_system(cls, images: dict[str, Image]) -> dict[str, Image]:
        for taken in (INSTALLER, KIOSK):
            if taken in images:
                raise ValueError(f"no image can be called {taken}, as the {taken} is")
        return images

    @field_validator("pools")
    @classmethod
    def _of_images(cls, pools: dict[str, Pool], others: ValidationInfo) -> dict[str, Pool]:
        images = others.data.get("images", {})
        for name, pool in pools.items():
            if images and pool.image not in images:
                near = _nearest(pool.image, images) or f"the images are: {', '.join(images)}"
                raise ValueError(f"{name}: there is no image {pool.image!r}; {near}")
        return pools

    @field_validator("machines")
    @classmethod
    def _on_networks(cls, machines: dict[str, Machine], others: ValidationInfo) -> dict[str, Machine]:
        for name, machine in machines.items():
            for kind, wanted in (("image", machine.image), ("network", machine.network)):
                there = others.data.get(f"{kind}s", {})
                if there and wanted and wanted not in there:
                    near = _nearest(wanted, there) or f"the {kind}s are: {', '.join(there)}"
                    raise ValueError(f"{name}: there is no {kind} {wanted!r}; {near}")
        return machines

    _source: Path = PrivateAttr(default=Path(DEFAULT_NAME))

    @property
    def source(self) -> Path:
        """The file this site was read from."""
        return self._source

    @property
    def directory(self) -> Path:
        """The directory of the site file, which relative paths in it start from."""
        return self._source.parent

    @property
    def artifacts_directory(self) -> Path:
        """Where what was built is kept."""
        return self.directory / self.artifacts.expanduser()

    @property
    def cache_directory(self) -> Path:
        """Where downloads and finished steps are kept."""
        return self.directory / self.cache.expanduser() if self.cache else self.artifacts_directory / ".cache"

    @property
    def bundle_repository(self) -> str | None:
        """The repository of bundles; a directory by its full path."""
        if self.bundles is None or re.match(r"https?://", self.bundles):
            return self.bundles
        return str(self.directory / Path(self.bundles).expanduser())

    def pool(self, name: str | None) -> tuple[str, Pool]:
        """The pool of that name, or the first one of the file, its directory by a full path.

        Raises InputError for an unknown name, or where there is none.
        """
        if not self.pools:
            raise InputError(self.source, None, "there is no pool", "describe one: pools: NAME: {image: …}")
        name = name if name is not None else next(iter(self.pools))
        if name not in self.pools:
            near = _nearest(name, self.pools) or f"the pools are: {', '.join(self.pools)}"
            raise InputError(self.source, None, f"there is no pool {name!r}", near)
        pool = self.pools[name]
        directory = self.directory / pool.directory.expanduser() / name
        desk = pool.desk and pool.desk.model_copy(
            update={
                field: self.directory / path
                for field in ("certificate", "key", "ca", "stations", "client_ca")
                if (path := getattr(pool.desk, field))
            }
        )
        relay = directory / pool.relay.expanduser()
        return name, pool.model_copy(update={"directory": directory, "relay": relay, "desk": desk})

    def machine(self, name: str, options: Mapping[str, object]) -> Machine:
        """The machine of that name, with options (fields of Machine) that come before what the file says.

        Raises InputError for an option that is wrong, or without an image.
        """
        described = self.machines.get(name)
        named = {"image", "bundle"} & set(options)
        if described is None and not named:
            raise InputError(
                self.source,
                None,
                f"there is no machine {name!r}",
                "describe it in machines:, or name its image: --image, or a bundle: --bundle",
            )
        of: dict[str, object] = {}
        if described and not named:
            of = {"bundle": described.bundle} if described.bundle else {"image": described.image}
        try:
            given = Machine.model_validate({**of, **options})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"][:1]))
            said = first["msg"].removeprefix("Value error, ")
            raise VdibuildError(f"{key}: {said} (given: {first['input']!r})" if key else said) from None
        # An image's version says nothing about another one.
        fields = {*options, *(("image", "bundle", "version") if named else ())}
        merged = (
            described.model_copy(update={key: getattr(given, key) for key in fields}) if described else given
        )
        if merged.image:
            self.image(merged.image)
        self.network(merged.network)
        return merged

    def network(self, name: str) -> MachineNetwork:
        """The network of that name, its files by full paths; raises InputError for an unknown name."""
        if name not in self.networks:
            near = _nearest(name, self.networks) or f"the networks are: {', '.join(self.networks)}"
            raise InputError(self.source, None, f"there is no network {name!r}", near)
        network = self.networks[name]
        return network.model_copy(update={"dns": network.dns and _rooted(network.dns, self.directory, "key")})

    def image(self, name: str | None) -> tuple[str, Image]:
        """The image of that name, or the first one of the file; raises InputError for an unknown name."""
        if name is None:
            return next(iter(self.images.items()))
        if name not in self.images:
            near = _nearest(name, self.images) or f"the images are: {', '.join(self.images)}"
            raise InputError(self.source, None, f"there is no image {name!r}", near)
        return name, self.images[name]


AnySystem = TypeVar("AnySystem", bound=System)


def load(path: Path) -> Site:
    """Read and check a site file. Raises InputError naming file, line and key."""
    source = path.resolve()
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            path, None, "there is no site file here", "go to the site's directory, or name one: --site FILE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        _refuse_duplicates(root, path)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(path, mark.line + 1 if mark else None, f"is no YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(path, None, f"is no YAML: {error}") from None
    try:
        site = Site.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often missing as well; what stands in the file is what a person can find.
        first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")[0]
        raise _explained(first, root, path) from None
    site._source = source
    return site.model_copy(
        update={
            "images": {name: _resolved_image(image, source.parent) for name, image in site.images.items()},
            "installer": _resolved(site.installer, source.parent),
            "kiosk": _resolved(site.kiosk, source.parent),
            "keys": _rooted(site.keys, source.parent, "signing"),
        }
    )


def _resolved_image(image: Image, directory: Path) -> Image:
    """An image whose files are named so that they are found from everywhere."""
    update = {"windows": image.windows and _rooted(image.windows, directory, *site_windows.FILES)}
    return _resolved(image, directory).model_copy(update=update)


def _resolved(system: AnySystem, directory: Path) -> AnySystem:
    """A system whose files are named so that they are found from everywhere."""
    return _rooted(system, directory, "playbook", "keyring")


def _rooted(model: _Any, directory: Path, *names: str) -> _Any:
    paths = {name: getattr(model, name) for name in names}
    rooted = {name: directory / path.expanduser() for name, path in paths.items() if path}
    return model.model_copy(update=rooted)


def schema() -> dict[str, Any]:
    """The JSON Schema of the site file, for editors to complete and check it by."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Site.model_json_schema()}


def _refuse_duplicates(node: yaml.Node | None, path: Path) -> None:
    """YAML lets a later key replace an earlier one without a word; a person meant one of the two."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[object, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(path, line, f"{key.value}: already given in line {seen[key.value]}")
            seen[key.value] = line
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path)


def _explained(error: ErrorDetails, root: yaml.Node | None, path: Path) -> InputError:
    """A validation error as a sentence about a line of the file."""
    location = [part for part in error["loc"] if part != "[key]"]
    line = _line(root, location)
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        hint = _nearest(str(location[-1]), known) or f"known here: {', '.join(known)}"
        return InputError(path, line, f"{key}: unknown key", hint)
    if error["type"] == "missing":
        return InputError(path, line, f"{key}: is missing", _described(location))
    if not location:
        return InputError(path, line, "is empty or no mapping", "see the example vdibuild.yaml")
    said = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (given: {error['input']!r})"
    return InputError(path, line, f"{key}: {said[:1].lower()}{said[1:]}{given}", _described(location))


def _line(node: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """The line of the key at that location, or of the nearest thing around it that exists."""
    line = node.start_mark.line + 1 if node else None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _model_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that describes the mapping at that location; None where the site chooses the keys."""
    described: Any = Site
    for part in location:
        if _is_model(described):
            field = described.model_fields.get(str(part))
            described = field.annotation if field else None
        else:
            described = next(iter(get_args(described)[1:]), None)
        if get_origin(described) in (Union, UnionType):
            # What may be left out is described by the model that it is otherwise.
            described = next(filter(_is_model, get_args(described)), described)
    return described if _is_model(described) else None


def _is_model(described: object) -> bool:
    return isinstance(described, type) and issubclass(described, BaseModel)


def _keys_at(location: Sequence[int | str]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def _described(location: Sequence[int | str]) -> str:
    model = _model_at(location[:-1])
    field = model.model_fields.get(str(location[-1])) if model else None
    return field.description or "" if field else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else ""
