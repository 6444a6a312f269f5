"""Machines from an image on a libvirt of the tests' own: one that starts, many that must not come to be."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import pytest

from tests.guest import libvirtd
from tests.guest.conftest import SITE, Built, SiteDirectory, small_site
from tests.guest.libvirtd import Libvirt

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

NETWORK = """
<network>
  <name>machines</name>
  <bridge name='virbr77'/>
  <domain name='example.org'/>
  <ip address='10.77.0.1' netmask='255.255.255.0'>
    <dhcp><range start='10.77.0.100' end='10.77.0.200'/></dhcp>
  </ip>
</network>
"""
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExampleExampleExampleExample admin"


@dataclass
class Hypervisor:
    """A site with one image, and a libvirt with a network and two pools; `small` has room for nothing."""

    site: SiteDirectory
    libvirt: Libvirt
    pool: Path

    def run(self, *arguments: str) -> str:
        """Run a command that has to succeed."""
        status, output = self.site.run(*arguments)
        assert status == 0, output
        return output

    def refused(self, *arguments: str) -> str:
        """Run a command that has to fail with a message for a person; returns all it said, on one line."""
        status, output = self.site.run(*arguments)
        assert status == 1, output
        assert "Traceback" not in output
        return " ".join(output.split())

    def entries(self) -> list[str]:
        """Machines in the network's DHCP and DNS, as it runs and as it is kept."""
        with self.libvirt.connection() as connection:
            network = connection.networkLookupByName("machines")
            texts = [network.XMLDesc(flags) for flags in (0, libvirt.VIR_NETWORK_XML_INACTIVE)]
        roots = [ElementTree.fromstring(text) for text in texts]  # noqa: S314 (libvirt wrote it)
        return [str(one.get("ip")) for root in roots for one in root.iter("host")]

    def leftovers(self) -> list[str]:
        """What is there of machines: volumes, entries, domains, journals."""
        found = [str(file) for file in self.pool.iterdir()] + self.entries()
        with self.libvirt.connection() as connection:
            found += [one.name() for one in connection.listAllDomains()]
        state = self.site.path / "artifacts/.machines"
        return found + [str(path) for path in state.glob("*") if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, cache: Path, built: Built) -> Iterator[Hypervisor]:
    site = small_site(tmp_path_factory.mktemp("hypervisor"), cache)
    site.take_versions(built.site)
    directory = tmp_path_factory.mktemp("libvirt")
    libvirtd.let_in(site.path)
    libvirtd.let_in(directory)
    with contextlib.ExitStack() as stack:
        pools = {name: directory / name for name in ("default", "small")}
        for path in (*pools.values(), directory / "daemon"):
            path.mkdir(mode=0o711)
        small = str(pools["small"])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=711", "tmpfs", small], check=True)
        stack.callback(subprocess.run, ["umount", small])
        system = stack.enter_context(libvirtd.system(directory / "daemon", own_network=True))
        with system.connection() as connection:
            connection.getCapabilities()  # at the first question libvirt asks every QEMU what it can do
            connection.networkDefineXML(NETWORK).create()
            for name, path in pools.items():
                text = f"<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
                connection.storagePoolCreateXML(text, 0)
        networks = {
            "default": {
                "name": "machines",
                "first": "10.77.0.10",
                "last": "10.77.0.11",
                "domain": "example.org",
            },
            "nowhere": {"name": "nowhere"},
        }
        machines = {"web": {"image": "small", "size": "2GiB", "address": "next", "authorized_keys": [KEY]}}
        settings = (
            f"\nlibvirt: {system.uri}\nnetworks: {json.dumps(networks)}\nmachines: {json.dumps(machines)}\n"
        )
        site.configure(SITE + settings)
        yield Hypervisor(site, system, pools["default"])
        site.close()


def ask(domain: Any, command: str, **arguments: object) -> Any:
    """What the guest agent answers."""
    text = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(libvirt_qemu.qemuAgentCommand(domain, text, 30, 0))["return"]


def read(domain: Any, path: str) -> str:
    """A file of the guest."""
    handle = ask(domain, "guest-file-open", path=path)
    return base64.b64decode(ask(domain, "guest-file-read", handle=handle)["buf-b64"]).decode()


def test_a_machine_is_up_and_gone(host: Hypervisor) -> None:
    output = host.run("provision", "web", "--wait")
    assert "copy (native)" in output
    assert "web.example.org answers at 10.77.0.10 after" in output
    with host.libvirt.connection() as connection:
        domain = connection.lookupByName("web")
        (root,) = (one for one in ask(domain, "guest-get-fsinfo") if one["mountpoint"] == "/")
        # The image's disk is 1 GiB.
        assert root["total-bytes"] > 1800 << 20
        # The image has an empty one.
        assert re.fullmatch("[0-9a-f]{32}\n", read(domain, "/etc/machine-id"))
        assert read(domain, "/root/.ssh/authorized_keys") == f"{KEY}\n"
    assert host.entries() == ["10.77.0.10"] * 4
    assert resolved(host, "web.example.org") == "10.77.0.10"
    assert "there is a machine web" in host.refused("provision", "web")
    assert host.run("deprovision", "web").strip().endswith("web is gone, with its volume web.raw in default")
    assert host.leftovers() == []
    assert host.libvirt.guests() == []


def resolved(host: Hypervisor, name: str) -> str:
    """The address that the network's name server has for a name."""
    script = f"import dns.message, dns.query; q = dns.message.make_query('{name}', 'A')"
    script += "; print(dns.query.udp(q, '10.77.0.1', timeout=10).answer[0][0])"
    argv = host.libvirt.inside([sys.executable, "-c", script])
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_what_is_not_there(host: Hypervisor) -> None:
    assert "there is no machine 'db'" in host.refused("provision", "db")
    assert "did you mean 'small'" in host.refused("provision", "db", "--image", "smal")
    assert "has no version 20200101.1" in host.refused("provision", "web", "--version", "20200101.1")
    assert "there is no storage pool fast" in host.refused("provision", "web", "--storage", "fast")
    nowhere = ("provision", "web", "--network", "nowhere")
    assert "networks.nowhere: has no first and last address" in host.refused(*nowhere)
    assert "there is no network nowhere" in host.refused(*nowhere, "--address", "dhcp")
    assert "there is no machine web" in host.refused("deprovision", "web")
    for name in ("../web", "Web", "web-", "web.example", "w" * 64):
        assert "is no name for a machine" in host.refused("deprovision", name)
    assert host.leftovers() == []


def test_what_does_not_fit(host: Hypervisor) -> None:
    said = host.refused("provision", "web", "--storage", "small")
    assert re.search(r"the pool small has \d+ MiB left, the system needs \d+", said)
    assert "too small" in host.refused("provision", "web", "--size", "1MiB")
    assert "does not fit" in host.refused("provision", "web", "--size", "128MiB")
    assert "10.78.0.1 is not in the network" in host.refused("provision", "web", "--address", "10.78.0.1")
    assert "10.77.0.1 is taken" in host.refused("provision", "web", "--address", "10.77.0.1")
    assert host.leftovers() == []


def test_what_is_somebodys(host: Hypervisor) -> None:
    """A volume, a domain, addresses: neither overwritten nor removed."""
    volume = host.pool / "web.raw"
    volume.write_text("precious")
    assert "there is a volume web.raw" in host.refused("provision", "web")
    assert volume.read_text() == "precious"
    volume.unlink()
    with host.libvirt.connection() as connection:
        text = "<domain type='qemu'><name>web</name><memory>1024</memory><os><type>hvm</type></os></domain>"
        theirs = connection.defineXML(text)
        try:
            assert "there is a machine web" in host.refused("provision", "web")
            assert "was not made by `provision`" in host.refused("deprovision", "web")
            assert connection.lookupByName("web").UUIDString() == theirs.UUIDString()
        finally:
            theirs.undefine()
    host.run("provision", "one", "--image", "small", "--address", "next", "--no-start")
    host.run("provision", "two", "--image", "small", "--address", "next", "--no-start", "--autostart")
    with host.libvirt.connection() as connection:
        assert connection.lookupByName("two").autostart()
    assert "all addresses from 10.77.0.10 to 10.77.0.11 are taken" in host.refused("provision", "web")
    assert "10.77.0.10 is taken" in host.refused("provision", "web", "--address", "10.77.0.10")
    host.run("deprovision", "one")
    assert sorted(host.entries()) == ["10.77.0.11"] * 4
    host.run("deprovision", "two")
    assert host.leftovers() == []


def test_an_image_that_was_changed(host: Hypervisor) -> None:
    (version,) = (host.site.path / "artifacts/small").glob("2*")
    disk = version / "disk.qcow2"
    kept = host.site.path / "kept"
    disk.rename(kept)
    shutil.copyfile(kept, disk)
    try:
        with disk.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"changed")
        assert "is damaged: disk.qcow2" in host.refused("provision", "web")
    finally:
        kept.replace(disk)
    assert host.leftovers() == []


@pytest.mark.parametrize("step", ["make the volume", "copy the disk", "enter it in the network"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended(host: Hypervisor, step: str, number: signal.Signals) -> None:
    """An interrupted run takes back what it made; after a killed one the next does."""
    process = host.site.start("provision", "web", "--no-start")
    assert process.stdout is not None
    for line in process.stdout:
        if f"✓ {step}" in line:
            os.killpg(process.pid, number)
            break
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGKILL:
        assert host.leftovers() != []
        assert "taking back the machine web" in host.refused("deprovision", "other")
    assert host.leftovers() == []
