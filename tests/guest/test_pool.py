"""Clones by a real libvirt and QEMU: of a disk that never boots, and of an image that does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest

from tests.guest import libvirtd
from tests.guest.conftest import Built, SiteDirectory
from tests.guest.libvirtd import Libvirt
from tests.guest.screens import Viewer
from tests.unit.test_store import add
from tests.waiting import until
from vdibuild.errors import StoreError, VerificationError
from vdibuild.install import domain as domains
from vdibuild.pool.clones import Endpoint
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Leases, Machine, State
from vdibuild.pool.overlay_clones import Hardware, OverlayCloner
from vdibuild.pool.screens import x_server
from vdibuild.settings.keys import Keys
from vdibuild.store import DISK, Store

POOL = "desktop"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    directory = tmp_path_factory.mktemp("libvirt")
    libvirtd.let_in(directory)
    with libvirtd.system(directory) as found:
        with found.connection() as connection:
            connection.getCapabilities()  # at the first question libvirt asks every QEMU what it can do
        yield found


@pytest.fixture(autouse=True)
def nothing_runs_on(system: Libvirt) -> Iterator[None]:
    """What a failed test leaves running is not the next one's."""
    yield
    with system.connection() as connection:
        for domain in connection.listAllDomains():
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()


def hardware(**changes: Any) -> Hardware:
    values: dict[str, Any] = {
        "memory": 256,
        "cores": 1,
        "disk": 512,
        "video": "virtio",
        "network": None,
        "accelerator": "tcg",
        "boot_seconds": 3,
        "reserve_memory": 256,
        "reserve_disk": 256,
    }
    return Hardware(**(values | changes))


@contextlib.contextmanager
def cloning(system: Libvirt, images: Store, image: str, **changes: Any) -> Iterator[OverlayCloner]:
    hypervisor = Hypervisor(system.uri)
    directory = system.directory / "pool"
    cloner = OverlayCloner(POOL, image, directory, hardware(**changes), images, hypervisor, system.directory)
    try:
        yield cloner
    finally:
        cloner.close()
        hypervisor.close()


@pytest.fixture
def images(system: Libvirt) -> Iterator[Store]:
    """A store with one version, of a disk that boots nothing."""
    there = Store(system.directory / "artifacts", Keys(signing=system.directory / "keys/key"))
    version = add(there)
    there.promote(version.image, version.name)
    yield there


def lease(tmp_path: Path, images: Store, image: str = "debian-13") -> Machine:
    leases = Leases(f"sqlite:///{tmp_path / 'leases.db'}")
    machine = leases.start(POOL, image, images.get(image).name, 10)
    leases.close()
    assert machine
    return machine


def outside(system: Libvirt, endpoint: Endpoint) -> Path:
    """Where libvirt's socket is outside of its mount namespace."""
    place = Path("/var/lib/libvirt/qemu")
    return system.directory / "var-lib-libvirt-qemu" / endpoint.socket.relative_to(place)


def test_a_machine_that_does_not_answer(system: Libvirt, images: Store, tmp_path: Path) -> None:
    machine = lease(tmp_path, images)
    place = system.directory / "pool/machines" / machine.lease

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner:
            with pytest.raises(VerificationError, match=f"{machine.name} does not answer after 3 s"):
                await cloner.make(machine)
            assert (place / "disk.qcow2").exists()
            assert await cloner.room() > 0
            found = await cloner.found()
            assert list(found) == [machine.lease]
            endpoint = found[machine.lease].endpoint
            assert endpoint
            assert found[machine.lease].trouble == ""
            assert len(endpoint.password) == 43
            assert endpoint.password not in repr(endpoint)
            with socket.socket(socket.AF_UNIX) as screen:
                screen.connect(str(outside(system, endpoint)))
            with system.connection() as connection:
                check_domain(connection, machine)
            await cloner.destroy(machine.lease)
            await cloner.destroy(machine.lease)
            assert await cloner.found() == {}
        assert not place.exists()
        assert system.leftovers() == []

    asyncio.run(run())


def check_domain(connection: Any, machine: Machine) -> None:
    domain = connection.lookupByUUIDString(machine.lease)
    assert domain.name() == machine.name
    assert not domain.isPersistent()
    root = ElementTree.fromstring(domain.XMLDesc())  # noqa: S314 (libvirt wrote it)
    assert root.find("./devices/graphics/listen").get("type") == "socket"  # type: ignore[union-attr]
    assert root.find("./devices/graphics").get("port") is None  # type: ignore[union-attr]
    assert root.find("genid").text  # type: ignore[union-attr]
    channels = {target.get("name") for target in root.iterfind("./devices/channel/target")}
    assert channels == {"com.redhat.spice.0", "org.qemu.guest_agent.0"}
    assert len(root.findall("./devices/redirdev")) == 4
    assert root.find("./devices/memballoon").get("model") == "virtio"  # type: ignore[union-attr]
    assert root.find("./devices/rng") is not None
    assert root.findall("./devices/interface") == []


def test_what_is_not_ours_is_never_touched(system: Libvirt, images: Store, tmp_path: Path) -> None:
    """Another pool's machine, one of another directory, and somebody's domain: neither seen nor destroyed."""
    machine = lease(tmp_path, images)

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner, system.connection() as connection:
            own = cloner.domain(machine, "bios", "x")
            xml = own.replace(str(system.directory / "pool" / "machines" / machine.lease / "disk.qcow2"), "")
            root = ElementTree.fromstring(xml)  # noqa: S314 (it is ours)
            devices = root.find("devices")
            assert devices is not None
            for disk in devices.findall("disk"):
                devices.remove(disk)
            mark = root.find("./metadata/*")
            assert mark is not None
            mark.set("directory", "/somewhere/else")
            connection.createXML(ElementTree.tostring(root, encoding="unicode"), 0)
            try:
                assert await cloner.found() == {}
                await cloner.destroy(machine.lease)
                assert connection.lookupByUUIDString(machine.lease).isActive()
            finally:
                connection.lookupByUUIDString(machine.lease).destroy()

    asyncio.run(run())


def test_leftovers_of_a_kill_are_found(system: Libvirt, images: Store, tmp_path: Path) -> None:
    machine = lease(tmp_path, images)
    place = system.directory / "pool/machines" / machine.lease

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner:
            place.mkdir(parents=True)
            (system.directory / "pool/machines/somebody's").mkdir()
            assert {name: found.endpoint for name, found in (await cloner.found()).items()} == {
                machine.lease: None
            }
            await cloner.destroy(machine.lease)
            assert not place.exists()
            assert (system.directory / "pool/machines/somebody's").exists()

    asyncio.run(run())


def test_a_damaged_image_is_not_cloned(system: Libvirt, images: Store, tmp_path: Path) -> None:
    machine = lease(tmp_path, images)
    disk = images.get("debian-13").path / DISK
    disk.chmod(0o644)
    with disk.open("r+b") as file:
        file.seek(100_000)
        file.write(b"damage")

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner:
            with pytest.raises(StoreError, match="damaged"):
                await cloner.make(machine)
            assert await cloner.found() == {}

    asyncio.run(run())


def test_a_killed_qemu_is_noticed(system: Libvirt, images: Store, tmp_path: Path) -> None:
    machine = lease(tmp_path, images)

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner:
            with pytest.raises(VerificationError, match="does not answer"):
                await cloner.make(machine)
            (guest,) = system.guests()
            os.kill(guest, signal.SIGKILL)
            async with asyncio.timeout(20):
                while (await cloner.found())[machine.lease].endpoint:
                    await asyncio.sleep(0.1)
            await cloner.destroy(machine.lease)
            assert system.leftovers() == []

    asyncio.run(run())


def test_an_image_in_use_is_kept(system: Libvirt, images: Store, tmp_path: Path) -> None:
    machine = lease(tmp_path, images)

    async def run() -> None:
        with cloning(system, images, "debian-13") as cloner:
            with pytest.raises(VerificationError):
                await cloner.make(machine)
            # Two, so that a rollback would return to another one than the machine's.
            for newer in [add(images), add(images)]:
                images.promote("debian-13", newer.name)
            collected = {entry.name: entry.reason for entry in images.gc("debian-13", keep=1)}
            assert collected[machine.version] == "in use"
            await cloner.keep(set())
            collected = {entry.name: entry.reason for entry in images.gc("debian-13", keep=1)}
            assert collected[machine.version] == "in use by a machine"
            await cloner.destroy(machine.lease)

    asyncio.run(run())


OLD = ("--spice-disable-audio", "--spice-disable-effects=animation", "-k", "--kiosk-quit=on-disconnect")
"""How the old client's script starts the viewer."""


def test_a_pool_of_a_real_image(system: Libvirt, site: SiteDirectory, built: Built, tmp_path: Path) -> None:
    """A pool of clones of an image, its relay, and the old client's own sequence of commands."""
    site.take_versions(built.site)
    libvirtd.let_in(site.path)
    signals, screens = free_ports()
    config = (site.path / "vdibuild.yaml").read_text()
    pool = {"image": "small", "clean": 1, "maximum": 2, "memory": "512MiB", "cores": 1, "listen": "127.0.0.1"}
    pool |= {"directory": str(system.directory / "pools"), "signal_port": signals, "spice_port": screens}
    text = f"{config}\nlibvirt: {system.uri}\npools: {json.dumps({'desktop': pool})}\n"
    (site.path / "vdibuild.yaml").write_text(text)
    inside = system.inside(["env", f"--chdir={site.path}"])
    served = site.start("pool.serve", through=inside)
    try:
        wait_until_served(served)
        leases = Leases(f"sqlite:///{system.directory / 'pools/desktop/leases.db'}")
        until(lambda: len(system.guests()) == 1, 60)
        (begun,) = leases.living("desktop")
        assert begun.state == State.STARTING
        # The next service finds the machine, while it starts and afterwards, and goes on with it.
        served = killed_and_served_again(served, site, inside)
        machine = wait_until_clean(leases, served)
        assert machine.lease == begun.lease
        served = killed_and_served_again(served, site, inside)
        assert leases.living("desktop") == [machine]
        status, output = site.run("pool.status")
        assert status == 0
        assert machine.name in output
        status, output = site.run("pool.clear")
        assert status == 1
        assert "is being served" in output
        with x_server() as display:
            asyncio.run(
                a_person_comes_and_goes(system, machine, leases, display, (signals, screens), tmp_path)
            )
        assert not (system.directory / "pools/desktop/machines" / machine.lease).exists()
        assert wait_until_clean(leases, served).lease != machine.lease
        assert (leases.get(machine.lease).reason or "").startswith("the client ")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(served.pid, signal.SIGTERM)
        served.wait(30)
    # Clean machines wait for the next service, and the relay carries on.
    assert system.leftovers() != []
    status, output = site.run("pool.clear")
    assert status == 0, output
    assert system.leftovers() == []
    assert site.wait_until_clean() == []


async def a_person_comes_and_goes(
    system: Libvirt, machine: Machine, leases: Leases, display: str, ports: tuple[int, int], directory: Path
) -> None:
    """Get a machine as the old client does, see it, and leave; returns when the machine is gone."""

    async def screen() -> Path:
        with system.connection() as connection:
            domain = connection.lookupByUUIDString(machine.lease)
            assert domains.screenshot(connection, domain, directory / "machine.png")
        return directory / "machine.png"

    await told_to_connect(ports[0])
    viewer = Viewer(display, directory, [f"spice://127.0.0.1:{ports[1]}", *OLD])
    try:
        await viewer.shows(screen)
        assert leases.get(machine.lease).state == State.IN_USE
        viewer.process.terminate()
        await viewer.ended()
        async with asyncio.timeout(30):
            while leases.get(machine.lease).state != State.GONE:
                await asyncio.sleep(0.1)
        with system.connection() as connection, pytest.raises(libvirt.libvirtError):
            connection.lookupByUUIDString(machine.lease)
    finally:
        viewer.stop()


async def told_to_connect(port: int) -> None:
    """Wait with the old client's command until it is told that there is a machine."""
    asking = await asyncio.create_subprocess_exec(
        "ncat", "-i", "1", "127.0.0.1", str(port), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert asking.stdout
    try:
        async with asyncio.timeout(60):
            while b"RULE ADDED, CONNECT NOW!" not in (line := await asking.stdout.readline()):
                assert line, "it hung up"
    finally:
        with contextlib.suppress(ProcessLookupError):
            asking.kill()
        await asking.wait()


def killed_and_served_again(
    served: subprocess.Popen[str], site: SiteDirectory, inside: Sequence[str]
) -> subprocess.Popen[str]:
    os.killpg(served.pid, signal.SIGKILL)
    served.wait()
    again = site.start("pool.serve", through=inside)
    wait_until_served(again)
    return again


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def wait_until_served(served: subprocess.Popen[str]) -> None:
    assert served.stdout is not None
    said = []
    for line in served.stdout:
        said.append(line)
        if "serves stations on port" in line:
            return
    raise AssertionError("".join(said))


def wait_until_clean(leases: Leases, served: subprocess.Popen[str]) -> Machine:
    end = time.monotonic() + 300
    while not (clean := [one for one in leases.living(POOL) if one.state == State.CLEAN]):
        assert served.poll() is None and time.monotonic() < end, "no machine became clean"
        time.sleep(0.5)
    return clean[0]
