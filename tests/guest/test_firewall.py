"""The station's firewall, between two network namespaces: what gets through, and what does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.network import Namespace
from vdibuild import process, resources, station

STATION, SERVER, OTHER = "192.0.2.20", "192.0.2.1", "192.0.2.2"
SECONDS = 0.5
SETTINGS = station.Settings(SERVER, syslog_server=OTHER)


@pytest.fixture(scope="module")
def world() -> Iterator[Namespace]:
    """The server, and another host."""
    made = Namespace()
    yield made
    made.close()


@pytest.fixture(scope="module")
def there(world: Namespace) -> Iterator[Namespace]:
    """The station, whose cable leads there."""
    made = Namespace()
    path = f"/proc/{os.getpid()}/fd/{world.descriptor}"
    made.ip(f"link add eth0 type veth peer name eth0 netns {path}")
    made.ip(f"address add {STATION}/24 dev eth0")
    for address in (SERVER, OTHER):
        world.ip(f"address add {address}/24 dev eth0")
    for one in (made, world):
        one.ip("link set eth0 up")
    rules = (resources.packaged() / "overlays/kiosk/etc/nftables.conf").read_text()
    with made.entered():
        process.run(["nft", "-f", "-"], stdin=rules + station.rules(SETTINGS))
    yield made
    made.close()


def connects(source: Namespace, target: Namespace, address: str, port: int) -> bool:
    """Whether a TCP connection can be made to where somebody listens."""
    with target.entered():
        listening = socket.create_server((address, port))
    with listening, source.entered():
        try:
            socket.create_connection((address, port), SECONDS).close()
        except OSError:
            return False
        return True


def arrives(source: Namespace, target: Namespace, address: str, port: int, sender: int = 0) -> bool:
    """Whether a UDP datagram comes to where somebody waits for it."""
    with target.entered():
        waiting = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        waiting.bind((address, port))
        waiting.settimeout(SECONDS)
    with source.entered():
        sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sending.bind(("", sender))
    with waiting, sending:
        try:
            sending.sendto(b"?", (address, port))
            return waiting.recv(10) == b"?"
        except OSError:
            return False


def test_its_server_is_reached_and_nothing_else(there: Namespace, world: Namespace) -> None:
    assert [port for port in (22, 80, 443, 5905, 5906, 5907) if connects(there, world, SERVER, port)] == [
        *SETTINGS.ports
    ]
    assert not connects(there, world, OTHER, 5905)
    assert connects(there, world, OTHER, 53)
    udp = [port for port in (53, 69, 123, 514, 5905) if arrives(there, world, SERVER, port)]
    assert udp == [53, 123]
    assert arrives(there, world, OTHER, 514)


def test_nobody_reaches_the_station(there: Namespace, world: Namespace) -> None:
    assert [port for port in (22, 53, 68, 5905, 6000) if connects(world, there, STATION, port)] == []
    assert not arrives(world, there, STATION, 68)
    assert not arrives(world, there, STATION, 123, sender=67)
    # But for the answers of a DHCP server.
    assert arrives(world, there, STATION, 68, sender=67)


def test_it_reaches_itself(there: Namespace) -> None:
    assert connects(there, there, "127.0.0.1", 53)
