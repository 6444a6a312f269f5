"""The pools of a site file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from vdibuild import site
from vdibuild.errors import InputError

IMAGES = """\
images:
  small: {family: debian, release: trixie, kickstart: small.ks.j2}
"""


def load(tmp_path: Path, pools: str) -> site.Site:
    path = tmp_path / "vdibuild.yaml"
    path.write_text(IMAGES + pools)
    return site.load(path)


def test_a_pool_needs_only_an_image(tmp_path: Path) -> None:
    name, pool = load(tmp_path, "pools: {desktop: {image: small, directory: pools}}\n").pool(None)
    assert name == "desktop"
    assert (pool.signal_port, pool.clean, pool.maximum) == (5905, 2, 8)
    assert pool.directory == tmp_path / "pools" / "desktop"
    assert pool.relay == pool.directory / "relay.sock"


def test_a_pool_that_nobody_can_see(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without spice_port and desk no station can see a machine"):
        load(tmp_path, "pools: {desktop: {image: small, spice_port: null}}\n")


def test_paths_of_the_desk(tmp_path: Path) -> None:
    desk = "{certificate: host.pem, key: /etc/host.key, ca: ca.pem, host: pool.example.org}"
    _, pool = load(tmp_path, f"pools: {{desktop: {{image: small, desk: {desk}}}}}\n").pool("desktop")
    assert pool.desk
    assert pool.desk.certificate == tmp_path / "host.pem"
    assert pool.desk.key == Path("/etc/host.key")
    assert pool.desk.stations == tmp_path / "stations"
    assert pool.desk.client_ca is None


HOURS = """\
pools:
  desktop:
    image: small
    clean: 1
    hours:
      - {days: [mon, fri], from: "08:00", to: "18:00", clean: 10}
      - {from: "22:30", to: "00:00", clean: 0}
"""


@pytest.mark.parametrize(
    ("moment", "clean"),
    [
        ("2026-01-05 08:00", 10),
        ("2026-01-05 07:59", 1),
        ("2026-01-05 18:00", 1),
        ("2026-01-06 12:00", 1),
        ("2026-01-09 17:59", 10),
        ("2026-01-10 23:59", 0),
        ("2026-01-11 00:00", 1),
    ],
)
def test_hours(tmp_path: Path, moment: str, clean: int) -> None:
    _, pool = load(tmp_path, HOURS).pool(None)
    assert pool.clean_at(datetime.fromisoformat(moment)) == clean


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("{image: smal}", r"there is no image 'smal'; did you mean 'small'"),
        ("{image: small, memory: 2}", "give a unit"),
        ("{image: small, maximum: 0}", "greater than or equal to 1"),
        ("{image: small, clen: 2}", "did you mean 'clean'"),
        ('{image: small, hours: [{from: "18:00", to: "08:00", clean: 2}]}', "end is not after the beginning"),
        ("{image: small, hours: [{from: 08:00, to: 18:00, clean: 2}]}", "with the quotes"),
        ('{image: small, hours: [{from: "8", to: "18:00", clean: 2}]}', "no time of the day"),
        ("{image: small, listen: nowhere}", "not a valid IPv4 or IPv6 address"),
    ],
)
def test_mistakes(tmp_path: Path, pool: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, f"pools:\n  desktop: {pool}\n")


def test_pools_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no pool\n.*describe one"):
        load(tmp_path, "").pool(None)
    with pytest.raises(InputError, match="there is no pool 'desk'"):
        load(tmp_path, "pools: {desktop: {image: small}}\n").pool("desk")


def test_what_machines_may_reach(tmp_path: Path) -> None:
    reach = "[{address: 10.20.0.5, tcp: [3128]}, {address: 10.30.0.0/24, udp: [53]}]"
    _, pool = load(
        tmp_path, f"pools: {{desktop: {{image: small, network: desktops, reach: {reach}}}}}\n"
    ).pool(None)
    assert [str(one.address) for one in pool.reach] == ["10.20.0.5/32", "10.30.0.0/24"]


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ("{image: small, reach: [{address: 10.20.0.5}]}", "without a network machines reach nothing"),
        ("{image: small, network: n, reach: [{address: 10.20.0.5/16}]}", "is not a valid IPv4 network"),
        ("{image: small, network: n, reach: [{address: proxy.example.org}]}", "is not a valid IPv4 network"),
        ("{image: small, network: n, reach: [{address: 10.20.0.5, tcp: [0]}]}", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_reached(tmp_path: Path, pool: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, f"pools: {{desktop: {pool}}}\n")
