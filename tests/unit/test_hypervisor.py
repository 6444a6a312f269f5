"""What hypervisor.setup makes: files compared with those that a person can read, each by its own program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt
import pytest

from vdibuild import hypervisor, site
from vdibuild.errors import HostError, InputError, VdibuildError

GOLDEN = Path(__file__).parent / "golden" / "hypervisor"

IMAGES = """\
images:
  small: {family: debian, release: trixie, kickstart: small.ks.j2}
"""
# Every host has this interface and this address.
SITE = """\
pools:
  desktop:
    image: small
    desk: {certificate: host.pem, key: host.key, ca: ca.pem, host: pool.example.org}
  other: {image: small, listen: 192.0.2.1, signal_port: 6000}
hypervisor:
  stations:
    interface: lo
    address: 127.0.0.1/8
    first: 127.0.1.10
    last: 127.0.1.99
    names: [stations.example.org]
    time: [time.example.org]
    administrators: [127.0.2.0/24]
"""
NETWORKS = """\
libvirt: test:///default
hypervisor:
  networks:
    desktops: {address: 10.30.0.1/24}
    closed: {kind: isolated, address: 10.31.0.1/24, first: 10.31.0.100, last: 10.31.0.120}
"""


def load(directory: Path, text: str) -> site.Site:
    (directory / "vdibuild.yaml").write_text(IMAGES + text)
    return site.load(directory / "vdibuild.yaml")


def program(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real programs, nft in a network of its own, where nobody has to be root; what systemctl heard."""
    directory = tmp_path / "programs"
    directory.mkdir()
    program(directory, "nft", 'exec unshare --user --map-root-user --net /usr/sbin/nft "$@"')
    program(directory, "systemctl", f'echo "$@" >>{directory}/heard')
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with chrony and systemd."""
    there = tmp_path / "root"
    (there / "etc/chrony").mkdir(parents=True)
    (there / "etc/chrony/chrony.conf").write_text("# confdir /etc/no\nconfdir /etc/chrony/conf.d\n")
    (there / "run/systemd/system").mkdir(parents=True)
    return there


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("dnsmasq.conf.j2", ("dnsmasq", "--test", "-C")),
        ("chrony.conf.j2", ("chronyd", "-p", "-f")),
        ("firewall.nft.j2", ("nft", "--check", "--file")),
        ("vdibuild-firewall.service", ("systemd-analyze", "verify", "--man=no")),
    ],
)
def test_configurations(programs: Path, tmp_path: Path, name: str, look: Sequence[str]) -> None:
    loaded = load(tmp_path, SITE)
    assert loaded.hypervisor.stations
    text = hypervisor.configurations(loaded, loaded.hypervisor.stations)[name]
    assert text == (GOLDEN / name.removesuffix(".j2")).read_text()
    file = tmp_path / name.removesuffix(".j2")
    file.write_text(text)
    said = subprocess.run([*look, str(file)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_networks(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "hypervisor:\n  networks:\n    desktops: {address: 10.30.0.1/24}\n"
        "    closed: {kind: isolated, address: 10.31.0.1/24}\n    lan: {kind: bridge, bridge: br0}\n",
    )
    for name, network in loaded.hypervisor.networks.items():
        xml = hypervisor.network_xml(loaded, name, network)
        assert xml == (GOLDEN / f"{name}.xml").read_text()
        (tmp_path / "network.xml").write_text(xml)
        subprocess.run(["virt-xml-validate", str(tmp_path / "network.xml"), "network"], check=True)


def test_files_are_written_once(programs: Path, root: Path, tmp_path: Path) -> None:
    loaded = load(tmp_path, SITE)
    changes = hypervisor.changes(loaded, root)
    assert [change.what for change in changes] == [
        f"write {root}/etc/dnsmasq.d/vdibuild-stations.conf",
        f"write {root}/etc/chrony/conf.d/vdibuild-stations.conf",
        f"write {root}/etc/vdibuild/firewall.nft",
        f"write {root}/etc/systemd/system/vdibuild-firewall.service",
        "start dnsmasq anew, and whenever this host starts",
        "start chronyd anew, and whenever this host starts",
        "start vdibuild-firewall anew, and whenever this host starts",
    ]
    assert "+dhcp-range=127.0.1.10,127.0.1.99,255.0.0.0,12h\n" in changes[0].difference
    assert not (root / "etc/dnsmasq.d").exists(), "a plan changes nothing"
    assert [change.make() for change in changes] == [""] * 7
    heard = (programs / "heard").read_text().splitlines()
    assert [line for line in heard if line.startswith("restart")] == [
        "restart dnsmasq",
        "restart chronyd",
        "restart vdibuild-firewall",
    ]
    assert hypervisor.changes(loaded, root) == []
    # What somebody changed by hand is set right, and only that.
    file = root / "etc/dnsmasq.d/vdibuild-stations.conf"
    file.write_text(file.read_text() + "port=53\n")
    again = hypervisor.changes(loaded, root)
    assert [change.what.split()[1] for change in again] == [str(file), "dnsmasq"]
    assert "-port=53\n" in again[0].difference


def test_the_pools_units(programs: Path, root: Path, tmp_path: Path) -> None:
    for name in ("systemd-sysusers", "systemd-tmpfiles"):
        program(programs, name, f'echo {name} "$@" >>{programs}/heard')
    (root / "etc/group").write_text("root:x:0:\nlibvirt-qemu:x:64055:\n")
    loaded = load(tmp_path, "hypervisor: {units: true}\n")
    changes = hypervisor.changes(loaded, root)
    assert [change.what.removeprefix(f"write {root}/etc/") for change in changes] == [
        "systemd/system/vdibuild-pool@.service",
        "systemd/system/vdibuild-relay@.service",
        "systemd/system/vdibuild-relay@.socket",
        "sysusers.d/vdibuild.conf",
        "tmpfiles.d/vdibuild.conf",
        "make the units' users, and have systemd read the units",
    ]
    assert [change.make() for change in changes][
        -1
    ] == "systemctl enable --now vdibuild-pool@NAME starts a pool"
    assert (programs / "heard").read_text().splitlines() == [
        f"systemd-sysusers {root}/etc/sysusers.d/vdibuild.conf",
        f"systemd-tmpfiles --create {root}/etc/tmpfiles.d/vdibuild.conf",
        "daemon-reload",
    ]
    assert (root / "etc/sysusers.d/vdibuild.conf").read_text() == (GOLDEN / "sysusers.conf").read_text()
    assert hypervisor.changes(loaded, root) == []


def test_a_host_without_qemu(root: Path, tmp_path: Path) -> None:
    (root / "etc/group").write_text("root:x:0:\n")
    with pytest.raises(HostError, match="no group of QEMU's"):
        hypervisor.changes(load(tmp_path, "hypervisor: {units: true}\n"), root)


def test_a_service_that_does_not_run(programs: Path, root: Path, tmp_path: Path) -> None:
    loaded = load(tmp_path, SITE)
    for change in hypervisor.changes(loaded, root):
        change.make()
    program(programs, "systemctl", 'case "$*" in "is-active --quiet chronyd") exit 3;; esac')
    assert [change.what.split()[1] for change in hypervisor.changes(loaded, root)] == ["chronyd"]


def test_a_host_without_systemd(programs: Path, root: Path, tmp_path: Path) -> None:
    (root / "run/systemd/system").rmdir()
    changes = hypervisor.changes(load(tmp_path, SITE), root)
    assert changes[-1].make() == "this host has no systemd: start vdibuild-firewall anew yourself"
    assert not (programs / "heard").exists()


def test_a_template_that_its_program_refuses(programs: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "templates/hypervisor").mkdir(parents=True)
    (tmp_path / "templates/hypervisor/dnsmasq.conf.j2").write_text("no-such-option\n")
    with pytest.raises(
        VdibuildError, match=r"dnsmasq refuses what templates/hypervisor/dnsmasq\.conf\.j2 makes"
    ):
        hypervisor.changes(load(tmp_path, SITE), root)


def test_a_host_whose_chrony_reads_no_further_files(programs: Path, root: Path, tmp_path: Path) -> None:
    (root / "etc/chrony/chrony.conf").write_text("pool time.example.org\n")
    with pytest.raises(HostError, match="names no directory for further files"):
        hypervisor.changes(load(tmp_path, SITE), root)


def test_an_interface_without_that_address(root: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"lo does not have the address 127\.0\.0\.9/8"):
        hypervisor.changes(load(tmp_path, SITE.replace("127.0.0.1/8", "127.0.0.9/8")), root)


@pytest.fixture
def networks(tmp_path: Path) -> Iterator[site.Site]:
    """A site whose libvirt is the test driver; its networks last as long as a connection does."""
    connection = libvirt.open("test:///default")
    yield load(tmp_path, NETWORKS)
    connection.close()


def test_a_bridge_that_is_not_there(networks: site.Site, tmp_path: Path) -> None:
    text = (
        f"libvirt: {networks.libvirt}\nhypervisor: {{networks: {{lan: {{kind: bridge, bridge: no-such}}}}}}\n"
    )
    with pytest.raises(HostError, match="there is no bridge no-such for the network lan"):
        hypervisor.changes(load(tmp_path, text), tmp_path)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("{}", "address: goes with the kinds nat and isolated"),
        ("{kind: bridge}", "bridge: goes with the kind bridge"),
        ("{kind: bridge, bridge: br0, address: 10.0.0.1/24}", "address: goes with the kinds nat"),
        ("{kind: bridge, bridge: br0, first: 10.0.0.1}", "on a bridge somebody else gives addresses"),
        ("{address: 10.0.0.1/24, first: 10.0.1.1}", r"10\.0\.1\.1 is not in 10\.0\.0\.0/24"),
        ("{address: 10.0.0.1/24, first: 10.0.0.9, last: 10.0.0.8}", "there is nothing between"),
        ('{kind: bridge, bridge: "x\'/><evil"}', "string should match pattern"),
    ],
)
def test_networks_that_make_no_sense(tmp_path: Path, network: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, f"hypervisor: {{networks: {{desktops: {network}}}}}\n")


def test_nothing_is_done_without_a_yes(networks: site.Site, tmp_path: Path) -> None:
    run = [sys.executable, "-c", "from vdibuild.console import program; program.run()", "hypervisor.setup"]
    refused = subprocess.run(run, cwd=tmp_path, input="no\n", capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "+<network>" in refused.stdout
    assert "nothing was changed" in refused.stderr
    done = subprocess.run([*run, "--yes"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
