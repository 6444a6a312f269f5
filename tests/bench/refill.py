"""How long it takes from a station's leaving to the next clean machine, beside a bare boot of the same image.

All run in one libvirt of the benchmark's own: a bare boot, the pool, and a bare boot again. A bare boot is an
overlay, the same domain, and asking the guest agent until it answers; no pool is there then. The pool may
have one machine, so that nothing of the next one can begin before the last one's station has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import libvirt_qemu

from tests.bench.report import Rows, met, spread
from tests.spice import Client
from vdibuild import host, private_libvirt, process
from vdibuild.pool.demo import POOL, site_file
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Leases, Machine, State
from vdibuild.pool.overlay_clones import Hardware, OverlayCloner
from vdibuild.pool.signal_port import PHRASE
from vdibuild.private_libvirt import PrivateLibvirt
from vdibuild.site import Site
from vdibuild.store import DISK, Store

RUNS = 2
_MEMORY = 512
_SECONDS = 600.0
_POLL_SECONDS = 0.05
_SERVE = "from vdibuild.console import program; program.run()"
_PROJECT = Path(__file__).parents[2]


def measure(site: Site, image: str) -> Rows:
    """Measure both, one after the other. Needs root."""
    with tempfile.TemporaryDirectory(prefix="vdibuild-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        (directory / "libvirt").mkdir()
        settings = 'user = "root"\ngroup = "root"\n'
        with private_libvirt.running(directory / "libvirt", settings=settings) as system:
            bare = [bare_boot(site, image, system.uri, directory / "bare")]
            with serving(site, image, system, directory) as ports:
                there = Leases(f"sqlite:///{directory / POOL / 'leases.db'}")
                with contextlib.closing(there):
                    wait_until_clean(there)
                    refills = [asyncio.run(leave(there, *ports)) for _ in range(RUNS)]
            # The same once more, for a host whose load changes meanwhile.
            end_machines(system.uri)
            bare.append(bare_boot(site, image, system.uri, directory / "bare"))
    ratio = statistics.median(refills) / statistics.median(bare)
    rows = (
        (f"a bare boot of {image}", spread(bare), "", ""),
        ("from a station's leaving to the next clean machine", spread(refills), "", ""),
        ("ratio", f"{ratio:.2f}", "under 1.1", met(ratio < 1.1)),
    )
    return Rows("The next clean machine", ("figure", "measured", "wanted", "reached"), rows)


def bare_boot(site: Site, image: str, uri: str, directory: Path) -> float:
    """Seconds from nothing to the guest agent's answer."""
    store = Store(site.artifacts_directory, site.keys)
    version = store.get(image)
    hardware = Hardware(_MEMORY, 1, 1024, "virtio", None, host.accelerator().name, _SECONDS, 0, 0)
    cloner = OverlayCloner(POOL, image, directory, hardware, store, Hypervisor(uri), site.directory)
    machine = _machine(image, version.name)
    xml = cloner.domain(machine, version.manifest().firmware, "bench")
    place = directory / "machines" / machine.lease
    place.mkdir(parents=True)
    connection = libvirt.open(uri)
    began = time.monotonic()
    overlay = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(version.path / DISK))
    process.run([*overlay, str(place / "disk.qcow2")])
    domain = connection.createXML(xml)
    try:
        while not _answers(domain):
            if time.monotonic() > began + _SECONDS:
                raise SystemExit(f"{image} does not answer after {_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - began
    finally:
        domain.destroy()
        connection.close()


def end_machines(uri: str) -> None:
    """End what the pool left: its clean machine waits for the next service."""
    connection = libvirt.open(uri)
    for domain in connection.listAllDomains():
        domain.destroy()
    connection.close()


def _machine(image: str, version: str) -> Machine:
    """A machine as the pool has it."""
    with contextlib.closing(Leases("sqlite://")) as there:
        started = there.start(POOL, image, version, 1)
        assert started
        return started


def _answers(domain: libvirt.virDomain) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', 5, 0)
    except libvirt.libvirtError:
        return False
    return True


@contextlib.contextmanager
def serving(site: Site, image: str, system: PrivateLibvirt, directory: Path) -> Iterator[tuple[int, int]]:
    """`pool.serve` for as long as the block runs; gives the signal port and the SPICE port."""
    signals, screens = _free_ports()
    pool = {
        "image": image,
        "clean": 1,
        "maximum": 1,
        "memory": f"{_MEMORY}MiB",
        "cores": 1,
        "disk": "1GiB",
        "reserve_memory": "256MiB",
        "reserve_disk": "256MiB",
        "directory": str(directory),
        "listen": "127.0.0.1",
        "signal_port": signals,
        "spice_port": screens,
    }
    (directory / "vdibuild.yaml").write_text(site_file(site, image, system.uri, pool))
    (directory / POOL).mkdir()
    log = directory / "service.log"
    with log.open("wb") as output:
        service = process.start(
            system.inside(["env", f"--chdir={directory}", sys.executable, "-c", _SERVE, "pool.serve"]),
            env={"PYTHONPATH": str(_PROJECT)},
            stdout=output,
        )
    try:
        _wait_until_served(service, log)
        yield signals, screens
    finally:
        process.stop(service)


def _wait_until_served(service: subprocess.Popen[bytes], log: Path) -> None:
    while "serves stations" not in log.read_text():
        if service.poll() is not None:
            raise SystemExit(f"pool.serve ended:\n{log.read_text()}")
        time.sleep(_POLL_SECONDS)


def wait_until_clean(there: Leases) -> None:
    end = time.monotonic() + _SECONDS
    while not any(machine.state == State.CLEAN for machine in there.living(POOL)):
        if time.monotonic() > end:
            raise SystemExit(f"no machine became clean in {_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


async def leave(there: Leases, signals: int, screens: int) -> float:
    """Get the machine, and leave it; seconds from then until the next one is clean."""
    reader, writer = await asyncio.open_connection("127.0.0.1", signals)
    while PHRASE.encode() not in (line := await reader.readline()):
        assert line, "the signal port hung up"
    client = Client({"plain": screens}, ssl.create_default_context())
    main = await client.link()
    assert not main.error
    while not any(machine.state == State.IN_USE for machine in there.living(POOL)):
        await asyncio.sleep(_POLL_SECONDS)
    writer.transport.abort()
    began = time.monotonic()
    client.close()
    await asyncio.to_thread(wait_until_clean, there)
    return time.monotonic() - began


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
