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
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import pytest

from tests import nameserver
from tests.guest import libvirtd
from tests.guest.conftest import SITE, Built, SiteDirectory, small_site
from tests.guest.libvirtd import Libvirt
from vdibuild.install import storage
from vdibuild.provision import names, network
from vdibuild.provision.journal import DnsEntry

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
ENDING = Path(__file__).with_name("ending.py")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExampleExampleExampleExample admin"


@dataclass
class Hypervisor:
    """A site with one image, and a libvirt with a network and two pools; `small` has room for nothing.

    server: the name server, with the entry of the machine `web`.
    """

    site: SiteDirectory
    libvirt: Libvirt
    pool: Path
    server: DnsEntry

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

    def ended(self, number: signal.Signals, places: str, *arguments: str) -> tuple[int, str]:
        """Run a command that ends itself (see ending.py). Returns its exit status and all it printed."""
        ending = [sys.executable, str(ENDING), str(int(number)), places]
        argv = ["env", "--default-signal=INT", *ending, *arguments]
        done = subprocess.run(
            argv,
            cwd=self.site.path,
            env=self.site.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def names(self) -> list[str]:
        """What the name server knows of the machine `web`."""
        pointer = self.server.address.split(".")[::-1]
        questions = [("web.example.org", "A"), (f"{'.'.join(pointer)}.in-addr.arpa", "PTR")]
        return [answer for question in questions for answer in nameserver.found(self.server, *question)]

    def entries(self) -> list[str]:
        """Machines in the network's DHCP and DNS, as it runs and as it is kept."""
        with self.libvirt.connection() as connection:
            network = connection.networkLookupByName("machines")
            texts = [network.XMLDesc(flags) for flags in (0, libvirt.VIR_NETWORK_XML_INACTIVE)]
        roots = [ElementTree.fromstring(text) for text in texts]  # noqa: S314 (libvirt wrote it)
        return [str(one.get("ip")) for root in roots for one in root.iter("host")]

    def leftovers(self) -> list[str]:
        """What is there of machines: volumes, entries, domains, journals."""
        found = [str(file) for file in self.pool.iterdir()] + self.entries() + self.names()
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
        (directory / "named").mkdir()
        server = stack.enter_context(nameserver.serving(directory / "named", "0.77.10.in-addr.arpa"))
        dns = {name: getattr(server, name) for name in ("server", "port", "zone", "reverse", "key")}
        networks = {
            "default": {
                "name": "machines",
                "first": "10.77.0.10",
                "last": "10.77.0.11",
                "domain": "example.org",
                "dns": dns,
            },
            "nowhere": {"name": "nowhere"},
        }
        machines = {"web": {"image": "small", "size": "2GiB", "address": "next", "authorized_keys": [KEY]}}
        settings = (
            f"\nlibvirt: {system.uri}\nnetworks: {json.dumps(networks)}\nmachines: {json.dumps(machines)}\n"
            "bundles: repository\n"
        )
        site.configure(SITE + settings)
        yield Hypervisor(site, system, pools["default"], server.model_copy(update={"address": "10.77.0.10"}))
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
    assert host.names() == ["10.77.0.10", "web.example.org."]
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


def test_several_at_once(host: Hypervisor) -> None:
    """libvirt does not look at a pool while it makes a volume there: for somebody else, all the time."""
    wanted = ("--image", "small", "--address", "next", "--no-start")
    with somebody_making_volumes(host):
        runs = [host.site.start("provision", name, *wanted) for name in ("one", "two")]
        for run in runs:
            output, _ = run.communicate(timeout=300)
            assert run.returncode == 0, output
        assert sorted(host.entries()) == ["10.77.0.10"] * 4 + ["10.77.0.11"] * 4
        runs = [host.site.start("deprovision", name) for name in ("one", "two")]
        for run in runs:
            output, _ = run.communicate(timeout=300)
            assert run.returncode == 0, output
    assert host.leftovers() == []


@contextlib.contextmanager
def somebody_making_volumes(host: Hypervisor) -> Iterator[None]:
    """Another program that uses the same pool, and is never refused itself."""
    ended, made = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        with host.libvirt.connection() as connection:
            while not ended.is_set():
                storage.make(connection.storagePoolLookupByName("default"), "theirs.raw", 1)
                storage.delete(storage.find(connection, "default", "theirs.raw"))
                made.release()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        assert made.acquire(timeout=60)
        try:
            yield
        finally:
            ended.set()
            working.result()


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
    """A volume, a domain, a name, addresses: neither overwritten nor removed."""
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
    names.enter(host.server)
    assert "web.example.org in example.org is there already" in host.refused("provision", "web")
    assert host.names() == ["10.77.0.10", "web.example.org."]
    names.leave(host.server)
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
    # What was prepared from it before it was changed could be used.
    shutil.rmtree(host.site.cache / "disks")
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


def test_a_bundle_on_a_new_disk(host: Hypervisor) -> None:
    """Who signed it is seen before a byte is used; then it has file systems, swap and a name of its own."""
    (version,) = (host.site.path / "artifacts/small").glob("2*")
    host.run("bundle", str(version / "disk.qcow2"), "template", "--name", "template-1")
    host.run("bundle.publish", "template", "repository")
    wanted = ("provision", "two", "--bundle", "template-1", "--address", "next", "--no-start")
    output = host.run(*wanted, "--size", "1200MiB", "--swap", "64MiB")
    assert "template-1 is signed by vdibuild" in output
    assert "unpack (native): files onto a new ext4, 64 MiB of swap" in output
    volume = host.pool / "two.raw"
    table = json.loads(subprocess.run(["sfdisk", "--json", volume], check=True, capture_output=True).stdout)
    parts = table["partitiontable"]["partitions"]
    sizes = [one["size"] >> 11 for one in parts]
    assert sizes == [1, 64, 1200 - 67]
    root = f"{volume}?offset={parts[2]['start'] * 512}"
    said = {}
    for name in ("/etc/hostname", "/etc/fstab", "/etc/motd", "/boot/grub/grub.cfg"):
        argv = ["debugfs", "-R", f"cat {name}", root]
        said[name] = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert said["/etc/hostname"] == "two.example.org\n"
    assert said["/etc/motd"] == "hello\n"
    identity = re.findall(r"^UUID=(\S+) +/ ", said["/etc/fstab"], re.M)[0]
    assert f"root=UUID={identity}" in said["/boot/grub/grub.cfg"]
    host.run("deprovision", "two")
    stored = host.site.path / "repository/template-1"
    signature = (stored / "SHA256SUMS.sig").rename(stored / "kept")
    assert "is not signed" in host.refused(*wanted)
    signature.rename(stored / "SHA256SUMS.sig")
    with (stored / "bundle.tar.zst").open("r+b") as file:
        file.write(b"changed")
    assert "is not what was signed" in host.refused(*wanted)
    assert "there is no bundle none" in host.refused("provision", "two", "--bundle", "none")
    assert host.leftovers() == []


JOURNAL, STORAGE = "vdibuild.provision.journal:Journal", "vdibuild.install.storage"
NETWORK_MODULE, NAMES, DOMAIN = (f"vdibuild.provision.{name}" for name in ("network", "names", "domain"))


@pytest.mark.parametrize(
    "places",
    [
        f"{STORAGE}:make:1",
        f"{STORAGE}:make:1,vdibuild.process:start:1",
        f"{NETWORK_MODULE}:enter:1",
        f"{NAMES}:enter:1",
        f"{DOMAIN}:start:1",
        f"{JOURNAL}.forget:1",
    ],
)
def test_a_run_that_is_interrupted(host: Hypervisor, places: str) -> None:
    """It takes back what it made, also when the machine is finished but nobody was told yet."""
    status, output = host.ended(signal.SIGINT, places, "provision", "web")
    assert status == 130, output
    assert "✓ take back what was made" in output
    assert host.leftovers() == []
    assert host.libvirt.guests() == []


def test_runs_that_are_killed(host: Hypervisor) -> None:
    """Each run takes back what the one before left, at whatever step that was killed."""
    places = [
        f"{JOURNAL}.write:1",
        f"{STORAGE}:make:1",
        f"{STORAGE}:make:1,vdibuild.process:start:1",
        f"{NETWORK_MODULE}:enter:1",
        f"{NAMES}:enter:1",
        f"{DOMAIN}:define:1",
        f"{DOMAIN}:start:1",
    ]
    for number, place in enumerate(places):
        status, output = host.ended(signal.SIGKILL, place, "provision", "web")
        assert status == -signal.SIGKILL, output
        assert ("taking back the machine web" in output) == (number > 0)
        assert host.leftovers() != []
    assert len(host.libvirt.guests()) == 1
    # Taking back can be ended as well.
    for place in (f"{DOMAIN}:remove:1", f"{NAMES}:leave:1", f"{NETWORK_MODULE}:leave:1"):
        status, output = host.ended(signal.SIGKILL, place, "deprovision", "other")
        assert status == -signal.SIGKILL, output
        assert host.leftovers() != []
    assert "taking back the machine web" in host.refused("deprovision", "other")
    assert host.leftovers() == []
    assert host.libvirt.guests() == []


def test_a_removal_that_is_killed(host: Hypervisor) -> None:
    """It is gone on with, also where the network was left in one of its two descriptions already."""
    host.run("provision", "web", "--no-start")
    with host.libvirt.connection() as connection:
        host_element = f"<host mac='{network.mac_of(IPv4Address('10.77.0.10'))}' name='web' ip='10.77.0.10'/>"
        connection.networkLookupByName("machines").update(
            libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE,
            libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST,
            -1,
            host_element,
            libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG,
        )
    assert host.entries() == ["10.77.0.10"] * 3
    status, _ = host.ended(signal.SIGKILL, f"{DOMAIN}:remove:1", "deprovision", "web")
    assert status == -signal.SIGKILL
    assert host.names() != []
    assert "there is no machine web" in host.refused("deprovision", "web")
    assert host.leftovers() == []
