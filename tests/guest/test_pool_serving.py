"""A pool as it is served: a machine that is taken out and put back, a viewer that redirects a USB device, and
sessions while everything is killed once.

Two hundred sessions of the latter are in tests/long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import libvirt
import pytest

from tests.guest import chaos, desktop
from tests.guest.conftest import SiteDirectory
from tests.guest.screens import Viewer
from tests.guest.test_pool import OLD, told_to_connect
from vdibuild import site as sites
from vdibuild.errors import VerificationError
from vdibuild.pool import server
from vdibuild.pool.leases import State
from vdibuild.pool.overlay_clones import TELLER
from vdibuild.pool.screens import x_server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

USB = ("xhci_pci", "usb_storage", "sr_mod")
EVERYTHING = "--spice-usbredir-redirect-on-connect=-1,-1,-1,-1,1"
LABEL_OFFSET = 16 * 2048 + 40  # ECMA-119, 8.4: the volume identifier in the primary volume descriptor
SECONDS = 120.0


def test_a_pool_that_is_served(site: SiteDirectory, tmp_path: Path) -> None:
    directory = tmp_path / "libvirt"
    directory.mkdir()

    async def scene() -> None:
        async with chaos.pool(site, directory, chaos.SMALL, (*desktop.MODULES, *USB)) as made:
            await made.clean()
            await a_message_is_shown(made)
            held = await a_machine_is_taken_out_and_put_back(made)
            with x_server() as display:
                await a_usb_device_is_in_the_machine(made, display, tmp_path)
            assert made.leases.get(held).linked, "it had waited for longest"
            await chaos.run(made, sessions=8, seed=1, pauses=(0.5, 1.5), rounds=1)
            made.check()
            assert set(made.done.values()) == {1}

    asyncio.run(scene())
    assert site.wait_until_clean() == []


TEXT = "It ends; $(touch /run/oops) `id` <b>in</b> 5 'minutes' \"now\"."


async def a_message_is_shown(made: chaos.Pool) -> None:
    """A message gets to the first program that a machine has for it, as it is."""
    machine = made.leases.living(chaos.POOL)[0]
    loaded = sites.load(made.site.path / "vdibuild.yaml")
    with made.system.connection() as connection:
        inside = desktop.Inside(desktop.domain(connection, machine.lease))

        async def said() -> str:
            async with asyncio.timeout(SECONDS):
                while not (written := inside.read("/run/told", 4096)).endswith(b"over\n"):
                    await asyncio.sleep(0.1)
            inside.write("/run/told", b"")
            return written.decode()

        async def told() -> str:
            await cloner.tell(machine.lease, TEXT)
            return await said()

        async def install(program: str, script: str) -> None:
            inside.write("/run/new", f"#!/bin/sh\n{{ {script}; echo over; }} >/run/told\n".encode())
            place = 'mkdir -p "${1%/*}"; chmod 755 /run/new; mv /run/new "$1"; echo over >/run/told'
            inside.start("sh", "-c", place, "sh", program)
            await said()

        inside.write("/run/told", b"")
        async with server.cloning(loaded, *loaded.pool(None)) as cloner:
            with pytest.raises(VerificationError, match="no program that shows messages"):
                await cloner.tell(machine.lease, TEXT)
            await install("/bin/msg.exe", "printf '%s\\n' \"$@\"")
            assert await told() == f"*\n/TIME:300\n{TEXT}\nover\n"
            await install("/bin/wall", "cat; echo wall $#")
            assert await told() == f"{TEXT}\nwall 0\nover\n"
            await install(TELLER, "printf '%s\\n' \"$@\"")
            assert await told() == f"{TEXT}\nover\n"
        with pytest.raises(libvirt.libvirtError):
            inside.read("/run/oops", 1)


async def a_machine_is_taken_out_and_put_back(made: chaos.Pool) -> str:
    """Pause a clean machine: another one takes its place, and it is still there after a kill. Returns it."""
    first, second = made.leases.living(chaos.POOL)

    async def told(task: str) -> None:
        status, output = await asyncio.to_thread(made.site.run, task, "--machine", first.name)
        assert status == 0, output

    async def states(*expected: State) -> None:
        async with asyncio.timeout(SECONDS):
            while [one.state for one in made.leases.living(chaos.POOL)] != list(expected):
                await asyncio.sleep(0.2)

    await told("pool.pause")
    await states(State.PAUSED, State.CLEAN, State.CLEAN)
    await made.kill_service()
    async with asyncio.timeout(SECONDS):
        while made.log.read_text().count("serves stations on port") < 2:
            await asyncio.sleep(0.2)
    await states(State.PAUSED, State.CLEAN, State.CLEAN)
    await told("pool.resume")
    await states(State.CLEAN, State.CLEAN)
    assert {first.lease, second.lease} == {one.lease for one in made.leases.living(chaos.POOL)}
    return first.lease


async def a_usb_device_is_in_the_machine(made: chaos.Pool, display: str, directory: Path) -> None:
    """A CD-ROM drive on USB that the viewer itself plays, with a disc in it: the guest reads the disc."""
    disc = directory / "disc.iso"
    (directory / "content").mkdir()
    await command("xorrisofs", "-quiet", "-V", "REDIRECTED", "-o", str(disc), str(directory / "content"))
    await told_to_connect(made.ports[0])
    url = f"spice://127.0.0.1:{made.ports[1]}"
    viewer = Viewer(display, directory, [url, *OLD, f"--spice-share-cd={disc}", EVERYTHING])
    try:
        async with asyncio.timeout(SECONDS):
            while await asyncio.to_thread(label, made) != b"REDIRECTED":
                assert viewer.process.poll() is None, "the viewer ended"
                await asyncio.sleep(0.5)
    finally:
        viewer.stop()


def label(made: chaos.Pool) -> bytes:
    """The label of the disc that the machine in use sees, if it sees one."""
    used = [machine for machine in made.leases.living(chaos.POOL) if machine.state == State.IN_USE]
    with contextlib.suppress(libvirt.libvirtError), made.system.connection() as connection:
        for machine in used:
            domain = desktop.domain(connection, machine.lease)
            if domain is not None:
                disc = desktop.Inside(domain).read("/dev/sr0", LABEL_OFFSET + 32)
                return disc[LABEL_OFFSET:].strip()
    return b""


async def command(*argv: str) -> None:
    running = await asyncio.create_subprocess_exec(*argv)
    assert await running.wait() == 0
