"""A warning on a real desktop: a machine of the image debian-13-desktop, which is built unless it is there.

`pytest tests/long/test_pool_warning.py`, as root. The picture is left in the test's directory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import libvirt
import pytest

from tests.guest import desktop, libvirtd
from tests.guest.conftest import PROGRAM
from tests.guest.libvirtd import Libvirt
from vdibuild import host
from vdibuild import site as sites
from vdibuild.install import domain as domains
from vdibuild.pool import screens
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Leases
from vdibuild.pool.overlay_clones import Hardware, OverlayCloner
from vdibuild.site import Site
from vdibuild.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

PROJECT = Path(__file__).parents[2]
IMAGE = "debian-13-desktop"
TEXT = "This session ends in 5 minutes; <b>$(reboot)</b> & `more`."
READY = "while ! pidof xfce4-panel || ! pidof xfdesktop; do sleep 1; done; sleep 30; echo ready >/run/ready"
SECONDS = 900


def test_a_warning_on_the_desktop(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "build-golden", "--image", IMAGE], cwd=PROJECT, check=False)
    assert done.returncode == 0
    directory = tmp_path / "libvirt"
    directory.mkdir()
    libvirtd.let_in(directory)
    with libvirtd.system(directory) as system:
        asyncio.run(scene(system, sites.load(PROJECT / "vdibuild.yaml"), tmp_path))
        assert system.leftovers() == []


async def scene(system: Libvirt, site: Site, pictures: Path) -> None:
    images = Store(site.artifacts_directory, site.keys)
    leases = Leases(f"sqlite:///{pictures / 'leases.db'}")
    machine = leases.start("desktop", IMAGE, images.get(IMAGE).name, 1)
    leases.close()
    assert machine
    hardware = Hardware(2048, 2, 2048, "virtio", None, host.accelerator().name, SECONDS, 0, 0)
    hypervisor = Hypervisor(system.uri)
    cloner = OverlayCloner(
        "desktop", IMAGE, system.directory / "pool", hardware, images, hypervisor, site.directory
    )
    try:
        await cloner.make(machine)
        with system.connection() as connection:
            domain = desktop.domain(connection, machine.lease)
            inside = desktop.Inside(domain)
            inside.start("sh", "-c", READY)
            async with asyncio.timeout(SECONDS):
                while not there(inside, "/run/ready"):
                    await asyncio.sleep(2)
            async with asyncio.timeout(SECONDS):
                while not await painted(connection, domain, pictures):
                    pass
            await cloner.tell(machine.lease, TEXT)
            async with asyncio.timeout(SECONDS):
                while differing(pictures / "before.png", pictures / "after.png") < 5000:
                    await asyncio.sleep(2)
                    assert domains.screenshot(connection, domain, pictures / "after.png")
            await asyncio.sleep(10)
            assert domains.screenshot(connection, domain, pictures / "after.png")
            assert differing(pictures / "before.png", pictures / "after.png") > 5000, "it went away by itself"
    finally:
        await cloner.destroy(machine.lease)
        cloner.close()
        hypervisor.close()


async def painted(connection: libvirt.virConnect, domain: libvirt.virDomain, pictures: Path) -> bool:
    """Whether there is a desktop, with a white panel, that stays as it is; before.png shows it then."""
    earlier, now = pictures / "earlier.png", pictures / "before.png"
    assert domains.screenshot(connection, domain, earlier)
    await asyncio.sleep(15)
    assert domains.screenshot(connection, domain, now)
    return screens.written(now) > 20_000 and differing(earlier, now) < 2000


def there(inside: desktop.Inside, path: str) -> bool:
    try:
        return bool(inside.read(path, 1))
    except libvirt.libvirtError:
        return False


def differing(one: Path, other: Path) -> int:
    """How many pixels of two pictures differ, in the upper half, where the clock's few do not matter."""
    if not other.exists():
        return 0
    crop = ["-gravity", "north", "-crop", "100%x50%+0+0", "+repage"]
    pair = ["(", str(one), *crop, ")", "(", str(other), *crop, ")"]
    said = subprocess.run(
        ["compare", "-metric", "AE", "-fuzz", "10%", *pair, "null:"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(float(said.stderr.split()[0]))
