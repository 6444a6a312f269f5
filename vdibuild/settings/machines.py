"""Machines that `provision` makes, and the networks that they are on."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, IPvAnyAddress, field_validator, model_validator

from vdibuild.settings.values import BundleName, Mac, Name, Port, Settings, Size, domain_name


class DnsUpdate(Settings):
    """A name server that takes updates (RFC 2136), signed with a TSIG key."""

    server: IPvAnyAddress
    """The address of the zone's primary server."""
    port: Port = 53
    """Its port."""
    zone: str
    """The zone that gets the machines' names, such as example.org."""
    reverse: str | None = None
    """The zone that gets their addresses, such as 122.168.192.in-addr.arpa; by default none does."""
    key: Path
    """The file with the TSIG key, as tsig-keygen writes it; relative to the site file."""
    ttl: Annotated[int, Field(ge=0)] = 3600
    """How many seconds others may remember a name."""


class MachineNetwork(Settings):
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
        return domain_name(domain) if domain else ""

    @model_validator(mode="after")
    def _range(self) -> MachineNetwork:
        if (self.first is None) != (self.last is None):
            raise ValueError("first and last go together")
        if self.first and self.last and self.last < self.first:
            raise ValueError("the last address is before the first")
        return self


class Machine(Settings):
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
