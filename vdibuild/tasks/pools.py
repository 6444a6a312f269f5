"""Tasks of a pool: serve it, look at it, change it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.exceptions import Exit
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vdibuild.errors import VdibuildError
from vdibuild.tasks.command import SITE, command, load_site, out, shown_duration, shown_size

if TYPE_CHECKING:
    from vdibuild.pool.leases import Leases, Machine
    from vdibuild.settings.pools import Pool


@command()
def pool_serve(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Keep a pool of clean machines, and hand each station one of its own."""
    import asyncio

    from vdibuild.pool import server

    _log_lines()
    loaded = load_site(site)
    name, settings = loaded.pool(pool)

    def ready(port: int) -> None:
        out.print(f"the pool {name} serves stations on port {port}", highlight=False)

    asyncio.run(server.serve(loaded, name, settings, ready))


@command()
def pool_relay(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Run a pool's relay in the place of the one that runs; pool.serve starts one where there is none."""
    import asyncio

    from vdibuild.pool import relay, relay_process

    _log_lines()
    _, settings = load_site(site).pool(pool)
    asyncio.run(relay.run(relay_process.config(settings)))


@command({"live": "go on, and show what changes"})
def pool_status(context: Context, pool: str | None = None, live: bool = False, site: str = SITE) -> None:
    """Show a pool's machines, and who has them."""
    from vdibuild.pool import server

    name, settings = load_site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        if not live:
            out.print(_status(name, settings, leases))
            return
        with Live(_status(name, settings, leases), console=out, auto_refresh=False) as shown:
            while True:
                shown.update(_status(name, settings, leases), refresh=True)
                time.sleep(1)


def _status(name: str, settings: Pool, leases: Leases) -> Table:
    sizing = leases.sizing(name)
    wanted = sizing.clean if sizing.clean is not None else settings.clean_at(datetime.now().astimezone())
    maximum = sizing.maximum if sizing.maximum is not None else settings.maximum
    machines = leases.living(name)
    count = Counter(machine.state for machine in machines)
    counted = ", ".join(f"{count[state]} {state}" for state in count) or "no machines"
    title = f"{name}: {sizing.mode}; {counted}; {wanted} wanted clean, {maximum} at most"
    columns = ("machine", "state", "for", "station", "version")
    table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
    now = datetime.now(UTC)
    for machine in machines:
        times = (machine.ended, machine.linked, machine.offered, machine.paused, machine.cleaned)
        since = next(filter(None, times), machine.started)
        where = escape(machine.station or "")
        table.add_row(machine.name, machine.state, shown_duration(now - since), where, machine.version)
    return table


@command({"number": "how many, the newest first", "station": "only those of a station, by name or address"})
def pool_leases(
    context: Context,
    pool: str | None = None,
    number: int = 50,
    station: str | None = None,
    site: str = SITE,
) -> None:
    """List who had which machine, when, for how long."""
    from vdibuild.pool import server

    name, settings = load_site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        found = leases.history(name, number, station)
    out.print(_history(found) if found else "nobody was offered a machine yet")


def _history(found: list[Machine]) -> Table:
    """Who had which machine, when, for how long."""
    table = Table(
        *("offered", "station", "address", "machine", "used for", "in", "out", "ended because"),
        box=None,
        pad_edge=False,
    )
    for lease in found:
        until = lease.ended or datetime.now(UTC)
        table.add_row(
            f"{lease.offered:%Y-%m-%d %H:%M:%S}",
            escape(lease.station or ""),
            lease.address or "",
            lease.name,
            shown_duration(until - lease.linked) if lease.linked else "not used",
            shown_size(lease.bytes_in) if lease.bytes_in is not None else "",
            shown_size(lease.bytes_out) if lease.bytes_out is not None else "",
            escape(lease.reason or ""),
        )
    return table


_MACHINE = {"machine": "only this one, by its name, as pool.status shows it, or its lease"}


@command(_MACHINE)
def pool_drain(
    context: Context, machine: str | None = None, pool: str | None = None, site: str = SITE
) -> None:
    """Offer no more machines and destroy those that nobody has; sessions go on to their end."""
    from vdibuild.pool.leases import UNUSED

    if machine is None:
        _set_mode(site, pool, "draining")
        return
    with _machine(site, pool, machine) as (leases, found):
        if leases.end(found.lease, "drained by the administrator", UNUSED):
            out.print(f"{found.name} will be destroyed", highlight=False)
        else:
            out.print(
                f"{found.name} is {leases.get(found.lease).state}: it ends with its session", highlight=False
            )


@command(_MACHINE)
def pool_pause(
    context: Context, machine: str | None = None, pool: str | None = None, site: str = SITE
) -> None:
    """Offer no more machines for now, and start none; or take one clean machine out, to look at it."""
    if machine is None:
        _set_mode(site, pool, "paused")
        return
    with _machine(site, pool, machine) as (leases, found):
        if not leases.pause(found.lease):
            raise VdibuildError(
                f"{found.name} is {leases.get(found.lease).state}: only a clean machine can be paused",
                "whoever has one keeps it: pool.drain ends it after the session, pool.destroy at once",
            )
    out.print(f"{found.name} is paused: nobody gets it until pool.resume", highlight=False)


@command(_MACHINE)
def pool_resume(
    context: Context, machine: str | None = None, pool: str | None = None, site: str = SITE
) -> None:
    """Serve again after pool.pause or pool.drain; or let a machine be had again that was paused."""
    if machine is None:
        _set_mode(site, pool, "serving")
        return
    with _machine(site, pool, machine) as (leases, found):
        if not leases.resume(found.lease):
            raise VdibuildError(f"{found.name} is {leases.get(found.lease).state}, not paused")
    out.print(f"{found.name} is clean again", highlight=False)


@contextlib.contextmanager
def _machine(site: str, pool: str | None, machine: str) -> Iterator[tuple[Leases, Machine]]:
    """The leases of a pool, and a living machine of it."""
    from vdibuild.pool import server

    name, settings = load_site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        yield leases, leases.find(name, machine)


def _set_mode(site: str, pool: str | None, mode: str) -> None:
    from vdibuild.pool import server
    from vdibuild.pool.leases import Mode

    name, settings = load_site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        leases.set_mode(name, Mode(mode))
    out.print(f"the pool {name} is {mode}", highlight=False)


@command({"clean": "how many clean machines to keep", "maximum": "how many machines at most"})
def pool_resize(
    context: Context,
    pool: str | None = None,
    clean: int | None = None,
    maximum: int | None = None,
    site: str = SITE,
) -> None:
    """Set a pool's size until told otherwise; without numbers, to what the site file says."""
    from vdibuild.pool import server

    name, settings = load_site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        leases.resize(name, clean, maximum)


@command({"machine": "its name, as pool.status shows it, or its lease"})
def pool_destroy(context: Context, machine: str, pool: str | None = None, site: str = SITE) -> None:
    """Destroy one machine, and end its session; the service does it within a second."""
    with _machine(site, pool, machine) as (leases, found):
        leases.end(found.lease, "destroyed by the administrator")
    out.print(f"{found.name} will be destroyed", highlight=False)


@command({"station": "the station's name"})
def pool_enrol(context: Context, station: str, pool: str | None = None, site: str = SITE) -> None:
    """Give a station a new token, which goes into its kiosk image; it is shown only once."""
    from vdibuild.pool import stations

    name, settings = load_site(site).pool(pool)
    if settings.desk is None:
        raise Exit(f"error: the pool {name} has no desk\n  describe it: pools: {name}: desk:", code=1)
    sys.stdout.write(stations.enrol(settings.desk.stations, station) + "\n")


@command()
def pool_clear(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Destroy everything of a pool that is not being served, and nothing else."""
    import asyncio

    from vdibuild.pool import server

    loaded = load_site(site)
    name, settings = loaded.pool(pool)
    count = asyncio.run(server.clear(loaded, name, settings))
    out.print(f"the pool {name} is empty: {count} machines were destroyed", highlight=False)


@command(
    {
        "pictures": "the directory that gets pictures of the stations' screens",
        "kiosk": "with a station that starts from the kiosk's ISO, which is built unless it is there",
    }
)
def pool_demo(
    context: Context,
    image: str | None = None,
    pictures: str = "artifacts/demo",
    kiosk: bool = False,
    site: str = SITE,
) -> None:
    """Show a pool on this host, with two stations and everything else of its own, and remove it again."""
    from vdibuild.pool import demo

    history = demo.run(load_site(site), image, Path(pictures), kiosk=kiosk)
    out.print(_history(history))
    out.print(f"pictures of the stations' screens: {pictures}", highlight=False, soft_wrap=True)


def _log_lines() -> None:
    """Log to standard error; where that is the journal, with the priority that it understands."""
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        handler.addFilter(_prioritised)  # sd-daemon(3)
        handler.setFormatter(logging.Formatter("<%(priority)d>%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _prioritised(record: logging.LogRecord) -> bool:
    record.priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
    return True
