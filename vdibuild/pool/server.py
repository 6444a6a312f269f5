"""Puts a pool together, from the site file, and runs it; looks at it and changes it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta

from vdibuild import host
from vdibuild.errors import BusyError, HostError, InputError
from vdibuild.pool import metrics, relay_process
from vdibuild.pool.broker import Limits
from vdibuild.pool.desk import Desk, Door, tls_context
from vdibuild.pool.firewall import Firewall
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Leases
from vdibuild.pool.overlay_clones import Hardware, OverlayCloner
from vdibuild.pool.pauses import freeze
from vdibuild.pool.relay_link import RelayLink
from vdibuild.pool.service import Service, Wishes
from vdibuild.pool.signal_port import SignalPort
from vdibuild.pool.stations import Stations
from vdibuild.settings import pools
from vdibuild.settings.pools import Pool
from vdibuild.site import Site
from vdibuild.store import Store

_LOCK = ".lock"
_BACKLOG = 1024
_TIDY_SECONDS = 10.0

_log = logging.getLogger(__name__)


def leases(name: str, pool: Pool) -> Leases:
    """The leases of a pool. Raises HostError."""
    try:
        pool.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"{pool.directory} cannot be made: {error.strerror}",
            f"see pools: {name}: directory in the site file",
        ) from None
    return Leases(pool.database or f"sqlite:///{pool.directory / 'leases.db'}")


@contextlib.contextmanager
def alone(name: str, pool: Pool) -> Iterator[None]:
    """Be the only one who runs a pool, for as long as the block runs. Raises BusyError."""
    with (pool.directory / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"the pool {name} is being served", "stop pool.serve first") from None
        yield


@contextlib.asynccontextmanager
async def cloning(
    site: Site, name: str, pool: Pool, let_in: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[OverlayCloner]:
    """What makes and destroys a pool's machines, for as long as the block runs. let_in: see OverlayCloner."""
    hardware = Hardware(
        memory=pool.memory,
        cores=pool.cores,
        disk=pool.disk,
        video=pool.video,
        network=pool.network,
        accelerator=host.accelerator().name,
        boot_seconds=pool.boot_seconds,
        reserve_memory=pool.reserve_memory,
        reserve_disk=pool.reserve_disk,
    )
    hypervisor = Hypervisor(site.libvirt)
    images = Store(site.artifacts_directory, site.keys)
    cloner = OverlayCloner(
        name, pool.image, pool.directory, hardware, images, hypervisor, site.directory, let_in
    )
    try:
        yield cloner
    finally:
        cloner.close()
        hypervisor.close()


def firewall(site: Site, name: str, pool: Pool) -> Firewall:
    """The rules of a pool's machines."""
    return Firewall(name, pool.directory, tuple(pool.reach), site.directory)


@contextlib.asynccontextmanager
async def fenced(site: Site, name: str, pool: Pool) -> AsyncIterator[Callable[[], Awaitable[None]] | None]:
    """Keep the rules of a pool's machines in force for as long as the block runs; yields what lets a new one
    in, None where they have no network. Raises HostError.
    """
    if pool.network is None:
        yield None
        return
    hypervisor = Hypervisor(site.libvirt)
    try:
        async with firewall(site, name, pool).kept(hypervisor, pool.network) as let_in:
            yield let_in
    finally:
        hypervisor.close()


async def serve(site: Site, name: str, pool: Pool, ready: Callable[[int], None]) -> None:
    """Serve a pool until the process is told to end (SIGTERM, SIGINT).

    ready: called once stations are served, with the port on which. The relay is started unless it is there.
    Sessions go on when this ends. Raises
    BusyError, HostError, StoreError.
    """
    there = leases(name, pool)
    wishes = Wishes(
        image=pool.image,
        clean=pool.clean_at,
        maximum=pool.maximum,
        session=timedelta(minutes=pool.session_minutes) if pool.session_minutes else None,
        idle=timedelta(minutes=pool.idle_minutes) if pool.idle_minutes else None,
    )
    limits = Limits(offer_seconds=pool.offer_seconds, waiting_per_address=pool.waiting_per_address)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(there.close)
        stack.enter_context(alone(name, pool))
        await stack.enter_async_context(_tidied(there))
        # What a person has to mend is found before anything begins.
        door = _desk(pool.desk) if pool.desk else None
        stations = stack.enter_context(_listening(str(pool.listen), pool.signal_port))
        let_in = await stack.enter_async_context(fenced(site, name, pool))
        cloner = await stack.enter_async_context(cloning(site, name, pool, let_in))
        await stack.enter_async_context(relay_process.kept(pool))
        relay = RelayLink(pool.relay)
        service = Service(name, wishes, there, cloner, relay, limits)
        await stack.enter_async_context(service.running())
        await stack.enter_async_context(relay.running(service))
        await stack.enter_async_context(SignalPort(service.broker).serving(stations))
        if pool.desk and door:
            known = stack.enter_context(_listening(str(pool.listen), pool.desk.port))
            desk = Desk(service.broker, Stations(pool.desk.stations), door[0])
            await stack.enter_async_context(desk.serving(known, door[1]))
        if pool.metrics_port is not None:
            local = stack.enter_context(_listening("127.0.0.1", pool.metrics_port))
            await stack.enter_async_context(metrics.serving(local, service, there))
        freeze()
        ready(stations.getsockname()[1])
        await _told_to_end()


async def clear(site: Site, name: str, pool: Pool) -> int:
    """Destroy everything of a pool: machines, sessions, the relay. Returns how many machines there were.

    Raises BusyError while the pool is being served.
    """
    there = leases(name, pool)
    with contextlib.closing(there), alone(name, pool):
        async with cloning(site, name, pool) as cloner:
            known = {machine.lease for machine in there.living(name)}
            ours = known | set(await cloner.found())
            for lease in ours:
                there.end(lease, "the pool was cleared")
                await cloner.destroy(lease)
                there.gone(lease)
            await relay_process.stop(pool)
            if pool.network is not None:
                firewall(site, name, pool).remove()
            return len(ours)


@contextlib.asynccontextmanager
async def _tidied(there: Leases) -> AsyncIterator[None]:
    """Keep the database tidy for as long as the block runs."""

    async def loop() -> None:
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            try:
                await asyncio.to_thread(there.tidy)
            except HostError as error:
                _log.error("%s", error)

    task = asyncio.create_task(loop())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _desk(settings: pools.Desk) -> tuple[Door, ssl.SSLContext]:
    """Where the relay is, and TLS. Raises InputError."""
    try:
        ca = settings.ca.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise InputError(settings.ca, None, f"cannot be read: {error}", "see desk in the site file") from None
    door = Door(settings.host, settings.tls_port, ca)
    return door, tls_context(settings.certificate, settings.key, settings.client_ca)


@contextlib.contextmanager
def _listening(address: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family, backlog=_BACKLOG) as listening:
            yield listening
    except OSError as error:
        raise HostError(
            f"cannot listen on {address}, port {port}: {os.strerror(error.errno or 0)}",
            "see listen and signal_port in the site file",
        ) from None


async def _told_to_end() -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    try:
        await told.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
