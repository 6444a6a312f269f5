"""The rules of a pool's network, compared with a file that a person can read."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from vdibuild.errors import HostError
from vdibuild.pool.firewall import Firewall, HostInterface, interface_name
from vdibuild.settings.pools import Reach

GOLDEN = Path(__file__).parent / "golden" / "pool-network.nft"
DIRECTORY = Path("/var/lib/vdibuild/pools/desktop")
HOST = (
    HostInterface("lo", (IPv4Interface("127.0.0.1/8"),)),
    HostInterface("virbr1", (IPv4Interface("10.30.0.1/24"), IPv4Interface("10.30.0.2/24"))),
    HostInterface("eth0", (IPv4Interface("10.20.0.2/24"),)),
    HostInterface("vd840614-01020b", ()),
    HostInterface("vd840614-01020a", ()),
    # Other pools' machines, and somebody's.
    HostInterface("vd840615-01020c", ()),
    HostInterface("vd840614-0102", ()),
    HostInterface("vnet0", ()),
)
REACH = (
    Reach.model_validate({"address": "10.20.0.0/16", "tcp": [80, 443]}),
    Reach.model_validate({"address": "10.20.0.5", "tcp": [3128]}),
    Reach.model_validate({"address": "10.30.0.1", "udp": [53], "tcp": [53]}),
    Reach.model_validate({"address": "192.0.2.7"}),
)


def firewall(*reach: Reach, directory: Path = DIRECTORY) -> Firewall:
    return Firewall("desktop", directory, reach, Path("/nowhere"))


def test_rules() -> None:
    assert firewall(*REACH).rules("virbr1", HOST) == GOLDEN.read_text()


def test_without_machines_nothing_is_let_through() -> None:
    rules = firewall(*REACH).rules("virbr1", HOST[:3])
    (machine,) = re.findall(r"chain machine \{\n\t\t(\w+)\n", rules)
    assert machine == "drop"


def test_two_pools_of_one_name_are_told_apart() -> None:
    one, other = firewall(), firewall(directory=Path("/srv/pools/desktop"))
    assert one.table != other.table
    names = {interface_name(pool.directory, "52:54:00:01:02:03") for pool in (one, other)}
    assert len(names) == 2
    assert all(len(name) == 15 and name.endswith("-010203") for name in names)


def test_refused_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nft = tmp_path / "nft"
    nft.write_text("#!/bin/sh\necho 'Error: Operation not permitted' >&2\nexit 1\n")
    nft.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="rules of the pool desktop: Error: Operation not permitted"):
        firewall().load("")
    assert not firewall().stands()
