"""hypervisor.setup on a libvirt and a network of the test's own, and a pool whose machines are on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.guest import desktop, libvirtd, systemd
from tests.guest.conftest import SiteDirectory
from tests.guest.libvirtd import Libvirt
from tests.guest.systemd import Systemd
from vdibuild import hypervisor, resources
from vdibuild import site as sites
from vdibuild.errors import HostError
from vdibuild.pool.leases import Leases, Machine, State

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

CAP_NET_ADMIN = 12  # capability(7), linux/capability.h
IMAGES = {"office": {"family": "windows", "release": "win10", "method": "adopt"}}
# A machine that somebody else made; its disk boots nothing.
BASE = """
<domain type='qemu'>
  <name>base</name>
  <memory unit='MiB'>128</memory>
  <os><type machine='pc'>hvm</type></os>
  <clock offset='localtime'/>
  <devices>
    <disk type='file'>
      <driver name='qemu' type='qcow2'/><source file='DISK'/><target dev='sda' bus='sata'/>
    </disk>
    <interface type='network'><source network='desktops'/><model type='e1000'/></interface>
  </devices>
</domain>
"""


def network(address: str) -> dict[str, object]:
    return {"hypervisor": {"networks": {"desktops": {"address": address}, "closed": CLOSED}}}


CLOSED = {"kind": "isolated", "address": "10.31.0.1/24", "first": "10.31.0.100", "last": "10.31.0.120"}


def capabilities() -> str:
    """Those of the pool's unit, for setpriv(1)."""
    unit = (resources.packaged() / "templates/vdibuild-pool@.service").read_text()
    (line,) = (line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet="))
    names = line.partition("=")[2].lower().replace("cap_", "").split()
    return ",".join(["-all", *(f"+{name}" for name in names)])


def enter(connection: Any, command: int, entry: str) -> None:
    """Change a machine's entry, as provision does."""
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE | libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG
    section = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST
    connection.networkLookupByName("desktops").update(command, section, -1, entry, flags)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_a_host_is_set_up_and_a_pool_uses_it(site: SiteDirectory, tmp_path: Path) -> None:
    directory = tmp_path / "libvirt"
    directory.mkdir()
    libvirtd.let_in(directory)
    libvirtd.let_in(site.path)
    with libvirtd.system(directory, own_network=True) as system:
        described = {"images": IMAGES, "libvirt": system.uri, "keys": {"signing": "key/signing"}}
        inside = system.inside(["env", f"--chdir={site.path}"])

        def configure(**more: object) -> None:
            (site.path / "vdibuild.yaml").write_text(json.dumps({**described, **more}))

        def setup() -> list[tuple[str, str]]:
            """What was changed, and what is left to do."""
            changes = hypervisor.changes(sites.load(site.path / "vdibuild.yaml"))
            return [(change.difference, change.make()) for change in changes]

        configure(**network("10.30.0.1/24"))
        (desktops, left), closed = setup()
        assert '+  <ip address="10.30.0.1" netmask="255.255.255.0">' in desktops
        assert left == closed[1] == ""
        with system.connection() as connection:
            made = connection.networkLookupByName("desktops")
            assert made.isActive() and made.isPersistent() and made.autostart()
            uuid = made.UUIDString()
        # Machines that provision enters are not taken for a difference, and not thrown out.
        entry = "<host mac='52:54:00:00:00:01' name='m' ip='10.30.0.20'/>"
        with system.connection() as connection:
            enter(connection, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, entry)
        assert setup() == []
        configure(**network("10.33.0.1/24"))
        with pytest.raises(HostError, match=r"knows the machines 10\.30\.0\.20"):
            setup()
        with system.connection() as connection:
            enter(connection, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, entry)
        # Another address: the network stays, and whoever is on it.
        ((changed, left),) = setup()
        assert '-  <ip address="10.30.0.1" netmask="255.255.255.0">' in changed
        assert left == "when no machine is on it: virsh net-destroy desktops && virsh net-start desktops"
        assert setup() == []
        with system.connection() as connection:
            assert connection.networkLookupByName("desktops").UUIDString() == uuid
        configure(
            **network("10.33.0.1/24"),
            pools={
                "desktop": {
                    "image": "office",
                    "network": "desktops",
                    "reach": [{"address": "10.20.0.5", "tcp": [3128]}],
                    "clean": 1,
                    "maximum": 1,
                    "memory": "128MiB",
                    "cores": 1,
                    "reserve_memory": "256MiB",
                    "directory": str(directory / "pools"),
                    "listen": "127.0.0.1",
                }
            },
        )
        disk = directory / "base.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
        with system.connection() as connection:
            connection.defineXML(BASE.replace("DISK", str(disk)))
        status, output = site.run("images.adopt", "base", through=inside)
        assert status == 0, output

        def said(*argv: str) -> str:
            return subprocess.run(system.inside(argv), capture_output=True, text=True, check=False).stdout

        served = site.start("pool.serve", through=[*inside, "setpriv", "--bounding-set", capabilities()])
        try:
            # The machine never answers, but it is there, on its network, behind its rules.
            wait_for("a machine runs", lambda: len(system.guests()) == 1)
            wait_for("it is on the bridge", lambda: ": vd" in said("ip", "link", "show", "master", "virbr0"))
            port = said("ip", "-details", "link", "show", "master", "virbr0")
            name = port.partition(": ")[2].partition(":")[0]
            assert " isolated on " in port
            rules = said("nft", "list", "ruleset", "bridge")
            assert f'iifname "{name.partition("-")[0]}-*" jump machine' in rules
            assert "ip daddr 10.20.0.5 tcp dport 3128 accept" in rules
            # The active network's address, not the one that it will have.
            assert "10.30.0.0/24" in rules
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(served.pid, signal.SIGTERM)
            served.wait(30)
        status, output = site.run("pool.clear", through=inside)
        assert status == 0, output
        assert said("nft", "list", "ruleset", "bridge") == ""
        assert system.leftovers() == ["domain base"]


NETWORKED = """
images:
  debian-13: {family: debian, release: trixie, kickstart: golden-debian.ks.j2}
keys: {signing: key/signing}
hypervisor: {units: true, networks: {desktops: {address: 10.30.0.1/24}}}
"""
# A machine that does as it should, and then pretends to be others.
TRIES = """#!/bin/sh
exec >/run/said 2>&1
ip link set eth0 up
udhcpc -n -q -i eth0 -s /run/bound && echo "got an address"
ping -c 1 -W 2 10.30.0.1 && echo "reached the host"
ip address add 10.30.0.250/24 dev eth0
ping -c 1 -W 2 -I 10.30.0.250 10.30.0.1 && echo "took an address"
ip link set eth0 address 52:54:00:99:99:99
ping -c 1 -W 2 10.30.0.1 && echo "took another's hardware"
echo "the end"
"""
BOUND = """#!/bin/sh
[ "$1" != bound ] || ip address add "$ip/24" dev eth0
"""


def test_a_pool_as_systemd_runs_it(site: SiteDirectory, tmp_path: Path) -> None:
    """The units that hypervisor.setup makes, with their own users: a machine on a network, and a session."""
    directory, state = tmp_path / "libvirt", tmp_path / "state"
    (directory / "guest").mkdir(parents=True)
    state.mkdir()
    libvirtd.let_in(directory)
    libvirtd.let_in(site.path)
    (site.path / "vdibuild.yaml").write_text(NETWORKED)
    template = desktop.make(directory / "guest", (*desktop.MODULES, "virtio_net"))
    desktop.add(site.path, "debian-13", template)
    (site.path / "artifacts").rename(state / "images")
    pool = {"image": "debian-13", "network": "desktops", "reach": [{"address": "10.30.0.1"}], "clean": 1}
    pool |= {"maximum": 1, "memory": "192MiB", "cores": 1, "listen": "127.0.0.1", "reserve_memory": "256MiB"}
    signer = f"tester {(site.path / 'key/signing.pub').read_text().strip()}"
    more = {
        "artifacts": str(systemd.STATE / "images"),
        "pools": {"desktop": pool},
        "libvirt": "qemu:///system",
    }
    text = NETWORKED.replace("signing: key/signing", f"allowed_signers: [{json.dumps(signer)}]")
    (site.path / "vdibuild.yaml").write_text(
        text + "".join(f"{key}: {json.dumps(more[key])}\n" for key in more)
    )
    with (
        libvirtd.system(directory, own_network=True) as system,
        systemd.running(system, state, site.path) as manager,
    ):
        try:
            scene_under_systemd(manager, system, state)
        except BaseException:
            print((state / "said").read_text())
            raise


def scene_under_systemd(manager: Systemd, system: Libvirt, state: Path) -> None:
    site = f"--site={systemd.CONFIGURATION}/vdibuild.yaml"
    pool, relay = "vdibuild-pool@desktop", "vdibuild-relay@desktop"

    def times_served() -> int:
        return (state / "said").read_text().count("serves stations on port")

    assert "make the units' users" in manager.run("vdibuild", "hypervisor.setup", "--yes", site)
    manager.run("systemctl", "start", pool)
    wait_for("the pool is served", lambda: times_served() == 1)
    with contextlib.closing(Leases(f"sqlite:///{state / 'pools/desktop/leases.db'}")) as leases:
        machine = clean_machine(leases)
        check_rights(manager.status(pool), manager.status(relay), manager.run("cat", "/etc/group"))
        said = tried(system, machine)
        assert "got an address" in said, said
        assert "reached the host" in said, said
        assert "took" not in said, said
        with sitting(manager) as lease:
            assert lease == machine.lease
            wait_for("it is in use", lambda: leases.get(lease).state == State.IN_USE)
            # Both are replaced, and the session goes on.
            before = manager.main(relay)
            manager.run("systemctl", "reload", relay)
            wait_for("there is another relay", lambda: manager.main(relay) not in (0, before))
            manager.run("systemctl", "restart", pool)
            wait_for("the pool is served again", lambda: times_served() == 2)
            assert leases.get(lease).state == State.IN_USE
        wait_for("it is gone", lambda: leases.get(lease).state == State.GONE)
        assert (leases.get(lease).reason or "").startswith("the client ")
    manager.run("systemctl", "stop", pool, f"{relay}.socket", f"{relay}.service")
    assert "the pool desktop is empty" in manager.run("vdibuild", "pool.clear", site)
    assert system.leftovers() == []


def check_rights(broker: dict[str, str], relay: dict[str, str], groups: str) -> None:
    """Each process is its own user, with what it needs of the host and nothing else. groups: /etc/group."""
    names = {line.split(":")[2]: line.split(":")[0] for line in groups.splitlines()}
    assert len({*broker["Uid"].split(), *relay["Uid"].split()} - {"0"}) == 2
    assert {names[one] for one in broker["Groups"].split()} == {"vdibuild", "libvirt", "kvm"}
    assert {names[one] for one in relay["Groups"].split()} == {"vdibuild", "libvirt-qemu"}
    for capabilities in ("CapPrm", "CapEff", "CapBnd"):
        assert int(broker[capabilities], 16) == 1 << CAP_NET_ADMIN
        assert int(relay[capabilities], 16) == 0


@contextlib.contextmanager
def sitting(manager: Systemd) -> Iterator[str]:
    """The lease of someone at a station, whose session lasts to the end of the block, and then ends."""
    argv = manager.inside(sys.executable, "-m", "tests.guest.sitting", "5905", "5906")
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(systemd.PROJECT)}
    station = subprocess.Popen(argv, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        assert station.stdout
        said, _, lease = station.stdout.readline().strip().partition(" ")
        assert said == "linked"
        yield lease
        assert station.communicate(timeout=30)[0] == ""
    finally:
        station.kill()
        station.wait()


def clean_machine(leases: Leases) -> Machine:
    wait_for("a machine is clean", lambda: [one.state for one in leases.living("desktop")] == [State.CLEAN])
    (machine,) = leases.living("desktop")
    return machine


def tried(system: Libvirt, machine: Machine) -> str:
    """What a machine says that has tried all."""
    with system.connection() as connection:
        guest = desktop.Inside(desktop.domain(connection, machine.lease))
        guest.write("/run/bound", BOUND.encode())
        guest.write("/run/tries", TRIES.encode())
        guest.start("sh", "-c", "chmod 755 /run/bound /run/tries; /run/tries")
        said = b""

        def ended() -> bool:
            nonlocal said
            with contextlib.suppress(libvirt.libvirtError):  # it has not begun
                said = guest.read("/run/said", 10_000)
            return said.endswith(b"the end\n")

        wait_for("the machine has tried all", ended)
    return said.decode()
