"""What a pool's machines may reach: rules of nftables on the interfaces of these machines and of no others.

The rules have a table of their own, in the family of bridges, where what a machine sends is seen before
anyone gets it: machines on the same bridge, this host, or whoever this host forwards it to. The host's own
rules, and those of libvirt, stay as they are and still apply.

Only what machines send is filtered, by where it goes: without answers nobody gets far with a machine either.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from vdibuild import config_template, process
from vdibuild.errors import CommandError, HostError, VdibuildError
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.site import Reach

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
        """The rules, for nft. bridge: the one that the machines are on. interfaces: this host's."""
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
    async def kept(self, hypervisor: Hypervisor, network: str) -> AsyncIterator[None]:
        """See that the rules stand for as long as the block runs, which begins when they do.

        network: libvirt's, which the machines are on. Afterwards they stay, as machines do. Raises HostError.
        """
        loaded = await self._keep(hypervisor, network, "")
        keeper = asyncio.create_task(self._look(hypervisor, network, loaded))
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _look(self, hypervisor: Hypervisor, network: str, loaded: str) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                loaded = await self._keep(hypervisor, network, loaded)
            except VdibuildError as error:
                _log.error("pool %s: %s", self.pool, error)

    async def _keep(self, hypervisor: Hypervisor, network: str, loaded: str) -> str:
        """Load the rules unless they stand as they should. Returns what is in force."""
        bridge = await hypervisor.call(lambda libvirt: str(libvirt.networkLookupByName(network).bridgeName()))
        rules = await asyncio.to_thread(lambda: self.rules(bridge, host_interfaces()))
        if rules != loaded or not await asyncio.to_thread(self.stands):
            await asyncio.to_thread(self.load, rules)
            _log.info("pool %s: its firewall stands", self.pool)
        return rules


def interface_name(directory: Path, mac: str) -> str:
    """The name of the interface through which this host reaches the machine of a pool with that MAC address.

    directory: the pool's.
    """
    return f"{_prefix(directory)}{mac.replace(':', '')[-6:]}"


def host_interfaces() -> list[HostInterface]:
    """The interfaces of this host that have IPv4 addresses (ip-address(8))."""
    said = process.run(["ip", "-json", "-4", "address", "show"], capture=True).stdout
    return [
        HostInterface(
            entry["ifname"],
            tuple(IPv4Interface(f"{one['local']}/{one['prefixlen']}") for one in entry["addr_info"]),
        )
        for entry in json.loads(said or "[]")
        if entry
    ]


def _disjoint(networks: set[IPv4Network]) -> list[IPv4Network]:
    """Networks without those that are part of another: an nft set refuses what overlaps."""
    return [one for one in networks if not any(one != other and one.subnet_of(other) for other in networks)]


def _prefix(directory: Path) -> str:
    """How the names of a pool's interfaces begin."""
    return f"vd{_hash(directory)}-"


def _hash(directory: Path) -> str:
    return hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:_DIGITS]
