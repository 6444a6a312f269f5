"""What hypervisor.setup makes of a host."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Literal

from pydantic import Field, model_validator

from vdibuild.settings.values import Domain, Interface, Name, Settings


class StationNetwork(Settings):
    """The network of the stations."""

    interface: Interface
    """This host's interface in it, such as enp5s0."""
    address: IPv4Interface
    """This host's address in it, such as 10.20.0.1/24, which its own network configuration gives it."""
    first: IPv4Address | None = None
    """The first of the addresses that stations get; by default the network's tenth."""
    last: IPv4Address | None = None
    """The last of them; by default the network's last."""
    names: list[Domain] = Field(default_factory=list)
    """Names by which stations find this host; those of the pools' desks are known without."""
    time: list[Domain] = Field(default_factory=list)
    """Time servers for this host; by default those it has."""
    administrators: list[IPv4Network] = Field(default_factory=list)
    """Who in this network may reach this host by SSH; by default nobody."""

    @model_validator(mode="after")
    def _range(self) -> StationNetwork:
        _check_range(self.address, self.first, self.last)
        return self


class LibvirtNetwork(Settings):
    """A network of libvirt for machines."""

    kind: Literal["nat", "isolated", "bridge"] = "nat"
    """nat: behind this host's address; isolated: they reach at most this host; bridge: on a bridge it has."""
    bridge: Interface | None = None
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


class Hypervisor(Settings):
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
