"""What a pool's machines may reach: rules of nftables on the interfaces of these machines and of no others.

The rules have a table of their own, in the family of bridges, where what a machine sends is seen before
anyone gets it: machines on the same bridge, this host, or whoever this host forwards it to. The host's own
rules, and those of libvirt, stay as they are and still apply.

Only what machines send is filtered, by where it goes: without answers nobody gets far with a machine either.
And by whom it says it is from: its own MAC address, and an IPv4 address that it got by DHCP, which is read in
the answers that come by here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import libvirt

from vdibuild import config_template, process
from vdibuild.errors import CommandError, HostError, VdibuildError
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import MAC_PREFIX
from vdibuild.settings.pools import Reach

TEMPLATE = "pool-network.nft.j2"

LOOK_SECONDS = 10.0
"""How often it is looked whether the rules still stand: `nft flush ruleset` takes them along."""

_DIGITS = 6  # of a hash: an interface's name has 15 characters (linux/if.h: IFNAMSIZ)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostInterface:
    """An interface of this host, and its addresses."""

    name: str
    addresses: tuple[IPv4Interface, ...]


@dataclass(frozen=True)
class _Machine:
    """A machine that is on the network. interface: this host's end of its cable."""

    interface: str
    mac: str


@dataclass(frozen=True)
class Firewall:
    """The rules of one pool. directory: the pool's, which tells it from others of its name on this host.
    reach: where its machines may go.
    """

    pool: str
    directory: Path
    reach: tuple[Reach, ...]
    site_directory: Path

    @property
    def table(self) -> str:
        """The name of the table."""
        return f"vdibuild-{self.pool}-{_hash(self.directory)}"

    def rules(self, bridge: str, interfaces: Sequence[HostInterface]) -> str:
        """The rules, for nft. bridge: the one that the machines are on. interfaces: this host's, those to
        machines included: what comes from others by their name is not let through.
        """
        own = {address for interface in interfaces for address in interface.addresses}
        on_bridge = {
            address for interface in interfaces if interface.name == bridge for address in interface.addresses
        }
        ours = {IPv4Network(address.ip) for address in own} | {address.network for address in on_bridge}
        return config_template.render(
            TEMPLATE,
            self.site_directory,
            pool=self.pool,
            table=self.table,
            prefix=_prefix(self.directory),
            machines=self._machines(interfaces),
            gateways=sorted(str(address.ip) for address in on_bridge),
            single=[one for one in self.reach if one.address.num_addresses == 1],
            wide=[one for one in self.reach if one.address.num_addresses > 1],
            ours=sorted(_disjoint(ours)),
        )

    def load(self, rules: str) -> None:
        """Put rules in force, in place of those of before. Raises HostError."""
        try:
            process.run(["nft", "-f", "-"], stdin=rules)
        except CommandError as error:
            said = " ".join(error.tail[:2])
            raise HostError(
                f"nft refuses the rules of the pool {self.pool}: {said}",
                "root, or CAP_NET_ADMIN, is needed for a pool with a network",
            ) from None

    def stands(self) -> bool:
        """Whether the table is there."""
        return process.run(["nft", "list", "table", "bridge", self.table], check=False).status == 0

    def remove(self) -> None:
        """Take the rules away, if there are any. Raises HostError."""
        # The first line makes it be there, so that it can be deleted.
        self.load(f"table bridge {self.table}\ndelete table bridge {self.table}\n")

    @contextlib.asynccontextmanager
    async def kept(
        self, hypervisor: Hypervisor, network: str
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """See that the rules stand for as long as the block runs, which begins when they do.

        network: libvirt's, which the machines are on. Yields what lets a machine in that has just been
        started. Afterwards the rules stay, as machines do. All of it raises HostError.
        """
        loaded = ""
        one_at_a_time = asyncio.Lock()

        async def keep() -> None:
            nonlocal loaded
            async with one_at_a_time:
                loaded = await self._keep(hypervisor, network, loaded)

        await keep()
        keeper = asyncio.create_task(self._look(keep))
        try:
            yield keep
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _look(self, keep: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await keep()
            except VdibuildError as error:
                _log.error("pool %s: %s", self.pool, error)

    async def _keep(self, hypervisor: Hypervisor, network: str, loaded: str) -> str:
        """Load the rules unless they stand as they should. Returns what is in force."""
        bridge = await hypervisor.call(lambda libvirt: str(libvirt.networkLookupByName(network).bridgeName()))
        interfaces = await asyncio.to_thread(host_interfaces)
        rules = self.rules(bridge, interfaces)
        known = bool(loaded) and await asyncio.to_thread(self.stands)
        if rules != loaded or not known:
            await asyncio.to_thread(self.load, rules)
        if not known:
            # Machines that got their addresses before the rules were there do not ask again for a while.
            given = await hypervisor.call(lambda libvirt: _given(libvirt.networkLookupByName(network)))
            await asyncio.to_thread(self._know, interfaces, given)
            _log.info("pool %s: its firewall stands", self.pool)
        return rules

    def _know(self, interfaces: Sequence[HostInterface], given: Mapping[str, IPv4Address]) -> None:
        """Note which addresses machines have, by their MAC addresses."""
        machines = [machine for machine in self._machines(interfaces) if machine.mac in given]
        known = [f'"{machine.interface}" . {int(given[machine.mac])}' for machine in machines]
        if known:
            self.load(f"add element bridge {self.table} addresses {{ {', '.join(known)} }}\n")

    def _machines(self, interfaces: Sequence[HostInterface]) -> list[_Machine]:
        """The machines of this pool, by the names of the interfaces to them."""
        named = re.compile(re.escape(_prefix(self.directory)) + "([0-9a-f]{2})" * 3)
        matches = sorted(
            filter(None, (named.fullmatch(one.name) for one in interfaces)), key=lambda one: one[0]
        )
        return [_Machine(match[0], ":".join((MAC_PREFIX, *match.groups()))) for match in matches]


def interface_name(directory: Path, mac: str) -> str:
    """The name of the interface through which this host reaches the machine of a pool with that MAC address.

    directory: the pool's.
    """
    return f"{_prefix(directory)}{mac.replace(':', '')[-6:]}"


def host_interfaces() -> list[HostInterface]:
    """The interfaces of this host, with their IPv4 addresses (ip-address(8))."""
    said = process.run(["ip", "-json", "address", "show"], capture=True).stdout
    return [
        HostInterface(
            entry["ifname"],
            tuple(
                IPv4Interface(f"{one['local']}/{one['prefixlen']}")
                for one in entry["addr_info"]
                if one["family"] == "inet"
            ),
        )
        for entry in json.loads(said or "[]")
    ]


def _given(network: Any) -> dict[str, IPv4Address]:
    """Which addresses libvirt's DHCP server has given, by MAC address; none where it is somebody else's."""
    try:
        leases = network.DHCPLeases()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return {}
        raise
    return {
        one["mac"]: IPv4Address(one["ipaddr"])
        for one in leases
        if one["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4
    }


def _disjoint(networks: set[IPv4Network]) -> list[IPv4Network]:
    """Networks without those that are part of another: an nft set refuses what overlaps."""
    return [one for one in networks if not any(one != other and one.subnet_of(other) for other in networks)]


def _prefix(directory: Path) -> str:
    """How the names of a pool's interfaces begin."""
    return f"vd{_hash(directory)}-"


def _hash(directory: Path) -> str:
    return hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:_DIGITS]
