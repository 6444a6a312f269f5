"""Invoke tasks for users: parse, call the library, print. No logic.

Every import of the library's heavier parts is inside its task, so that `--list` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vdibuild import progress
from vdibuild.errors import (
    CommandError,
    InstallationError,
    StoreError,
    VdibuildError,
    VerificationError,
)

if TYPE_CHECKING:
    from vdibuild.golden import Plan
    from vdibuild.manifest import AnyManifest
    from vdibuild.pool.leases import Leases, Machine
    from vdibuild.settings.pools import Pool
    from vdibuild.site import Site
    from vdibuild.store import Store, Version

SITE = os.environ.get("VDIBUILD_SITE", "vdibuild.yaml")
HELP = {
    "image": "the image's name; by default the first one of the site file",
    "pool": "the pool's name; by default the first one of the site file",
    "site": "the site file (also: $VDIBUILD_SITE)",
    "version": "the version; by default the promoted one",
}

_TAILED = (CommandError, InstallationError, VerificationError)
_out = Console()


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _reported(body: Callable[..., None]) -> Callable[..., None]:
    """Show progress, and a failure as one message for a person, with the failing command's last lines."""

    @functools.wraps(body)
    def run(*args: Any, **options: Any) -> None:
        # A stopped service manager or CI sends SIGTERM; it deserves the same tidying as Ctrl-C.
        signal.signal(signal.SIGTERM, _terminated)
        console = Console(stderr=True)
        try:
            with progress.reporting(console):
                body(*args, **options)
        except VdibuildError as error:
            for line in error.tail if isinstance(error, _TAILED) else ():
                console.print(f"  | {line}", highlight=False, markup=False)
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            raise Exit(f"error: {error}{notes}", code=1) from None
        except KeyboardInterrupt:
            raise Exit("interrupted; what was under way has been removed", code=130) from None

    return run


def _task(help: dict[str, str] | None = None, **options: Any) -> Callable[[Callable[..., None]], Any]:
    def decorate(body: Callable[..., None]) -> Any:
        # Invoke wants help only for parameters that exist.
        names = body.__code__.co_varnames[1 : body.__code__.co_argcount]
        texts = {**{name: HELP[name] for name in names if name in HELP}, **(help or {})}
        return task(help=texts, **options)(_reported(body))

    return decorate


def _site(path: str) -> Site:
    from vdibuild import site

    return site.load(Path(path))


def _store(path: str) -> tuple[Site, Store]:
    from vdibuild.store import Store

    site = _site(path)
    return site, Store(site.artifacts_directory, site.keys)


@_task(
    {
        "fresh": "take no finished step of an earlier run",
        "keep": "leave the directory of a step that fails, and say where",
        "shell": "open a shell in the system whose step failed",
        "plan": "print what would run and what is cached; change nothing",
        "promote": "make the new version the current one",
    }
)
def build_golden(
    context: Context,
    image: str | None = None,
    site: str = SITE,
    fresh: bool = False,
    keep: bool = False,
    shell: bool = False,
    plan: bool = False,
    promote: bool = True,
) -> None:
    """Build an image: sealed, booted, signed, versioned."""
    from vdibuild import golden

    loaded = _site(site)
    if plan:
        _print_plan(golden.plan(loaded, image))
        return
    opened = golden.open_shell if shell else None
    built = golden.build(loaded, image, fresh=fresh, keep=keep, promote=promote, on_failure=opened)
    _say_built(built.version, "disk.qcow2", built.unchanged)


@_task(
    {
        "fresh": "take no finished step of an earlier run",
        "keep": "leave the directory of a step that fails, and say where",
        "promote": "make the new version the current one",
    }
)
def build_installer(
    context: Context, site: str = SITE, fresh: bool = False, keep: bool = False, promote: bool = True
) -> None:
    """Build the ISO that installs systems by their kickstarts: booted, signed, versioned."""
    from vdibuild import installer
    from vdibuild.live import ISO

    built = installer.build(_site(site), fresh=fresh, keep=keep, promote=promote)
    _say_built(built.version, ISO, built.unchanged)


@_task(
    {
        "fresh": "take no finished step of an earlier run",
        "keep": "leave the directory of a step that fails, and say where",
        "promote": "make the new version the current one",
    }
)
def build_kiosk_iso(
    context: Context, site: str = SITE, fresh: bool = False, keep: bool = False, promote: bool = True
) -> None:
    """Build the ISO of stations: booted, signed, versioned."""
    from vdibuild import kiosk
    from vdibuild.live import ISO

    built = kiosk.build(_site(site), fresh=fresh, keep=keep, promote=promote)
    _say_built(built.version, ISO, built.unchanged)


@_task(
    {
        "medium": "an ISO, or the device of a card",
        "set": "KEY=VALUE, a setting to change; may be given several times",
        "ca": "the certificates (PEM) that the server is known by",
        "login": "ask for the password that a person begins a session with",
        "technician": "ask for the password of the station's technician",
    },
    positional=["medium"],
    iterable=["set"],
)
def kiosk_configure(
    context: Context,
    medium: str,
    set: list[str] | None = None,
    ca: str | None = None,
    login: bool = False,
    technician: bool = False,
) -> None:
    """Show a station's settings, or change them in place."""
    from vdibuild import kiosk, station

    changes = _changes(set)
    for key, wanted in zip(station.PASSWORDS, (login, technician), strict=True):
        if wanted:
            password = _out.input(f"The password for {key} (empty: none is asked for): ", password=True)
            changes[key] = station.hashed(password) if password else ""
    if changes or ca:
        kiosk.configure(Path(medium), changes, Path(ca) if ca else None)
    sys.stdout.write(kiosk.settings(Path(medium)))


def _changes(words: list[str] | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in words or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise VdibuildError(f"--set {key}: give a value: --set {key}=VALUE")
    return {key: value for key, _, value in pairs}


@_task()
def kiosk_cards(context: Context) -> None:
    """List the cards that can be written, by model, size and serial number."""
    from vdibuild.live import card

    for one in card.candidates(1):
        _out.print(str(one), highlight=False, soft_wrap=True)


@_task(
    {
        "device": "the card's device, or several, parted by commas; kiosk.cards lists them",
        "image": "the ISO; by default the current version of the kiosk",
        "set": "KEY=VALUE, a setting of the station; may be given several times",
        "ca": "the certificates (PEM) that the server is known by",
        "verify_only": "write nothing: compare the cards with their version, but for their settings",
        "internal": "write also to a device that cannot be taken out",
    },
    positional=["device"],
    iterable=["set"],
)
def write_card(
    context: Context,
    device: str,
    image: str = "",
    set: list[str] | None = None,
    ca: str | None = None,
    verify_only: bool = False,
    internal: bool = False,
    site: str = SITE,
) -> None:
    """Write the kiosk to cards, all at once, and read them back."""
    from vdibuild import kiosk
    from vdibuild.live import ISO, card
    from vdibuild.settings.live_systems import KIOSK

    found = {one.path: one for one in (card.find(Path(word)) for word in device.split(","))}
    if verify_only:
        _verify_cards([*found], Path(image) if image else None, site)
        return
    source = Path(image) if image else _store(site)[1].verify(KIOSK).version.path / ISO
    size = source.stat().st_size
    for one in found.values():
        if refused := card.refusal(one, size, internal=internal):
            raise VdibuildError(f"{one}", refused)
    span, settings = kiosk.partition_with(source, _changes(set), Path(ca) if ca else None)
    for one in found.values():
        _out.print(f"{one}", highlight=False, soft_wrap=True)
    names = [path.name for path in found]
    it, its_name, its_switch = ("it", "its name", "its switch")
    if len(names) > 1:
        it, its_name, its_switch = ("them", "their names", "their switches")
    _out.print(f"All that is on {it} will be lost.")
    if sorted(_out.input(f"Type {its_name} ({' '.join(names)}) to go on: ").split()) != sorted(names):
        raise VdibuildError("nothing was written")
    card.write(source, [*found], {span: settings})
    written = f"{', '.join(map(str, found))} {'is' if len(names) == 1 else 'are'} written and read back"
    _out.print(f"{written}: take {it} out, and push {its_switch} to LOCK", highlight=False, soft_wrap=True)


def _verify_cards(cards: list[Path], image: Path | None, site: str) -> None:
    """Compare cards with an image, or each with the version that it was written from."""
    from vdibuild import kiosk
    from vdibuild.live import ISO, card, iso
    from vdibuild.settings.live_systems import KIOSK

    sources: dict[Path, list[Path]] = {}
    for path in cards:
        source = image
        if source is None:
            store = _store(site)[1]
            version = store.labelled(KIOSK, iso.label(path))
            source = version.path / ISO
            if source not in sources:
                store.verify(KIOSK, version.name)
        sources.setdefault(source, []).append(path)
    for source, paths in sources.items():
        card.verify(source, paths, [kiosk.place(source)])
        for path in paths:
            _out.print(f"{path} holds {source}; its settings are:", highlight=False, soft_wrap=True)
            sys.stdout.write(kiosk.settings(path))


@_task()
def show_kickstart(context: Context, image: str | None = None, site: str = SITE) -> None:
    """Print an image's kickstart, rendered and checked."""
    from vdibuild import bootstrap
    from vdibuild.kickstart import anaconda

    loaded = _site(site)
    name, settings = loaded.image(image)
    if anaconda.executes(settings):
        sys.stdout.write(anaconda.read(loaded, name, settings).text)
    else:
        sys.stdout.write(bootstrap.read_recipe(loaded, name, settings).text)


@_task({"output": "the file to write"})
def windows_answers(context: Context, output: str, image: str | None = None, site: str = SITE) -> None:
    """Write a Windows image's answers as a CD-ROM: Setup reads them from it."""
    from vdibuild.families import windows

    loaded = _site(site)
    name, settings = loaded.image(image)
    windows.write_medium(loaded, name, settings, Path(output))
    _out.print(f"{output}: attach it beside Windows' ISO; it holds the account's password", highlight=False)


@_task()
def site_schema(context: Context) -> None:
    """Print the site file's JSON Schema."""
    from vdibuild import site

    sys.stdout.write(json.dumps(site.schema(), indent=2) + "\n")


@_task()
def doctor(context: Context, site: str = SITE) -> None:
    """Say what this host lacks, and what mends it."""
    from vdibuild import host

    table = Table("", "what", "found", "to mend it", box=None, pad_edge=False)
    checks = host.doctor(_site(site))
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]no[/]" if check.required else "[yellow]--[/]"
        table.add_row(mark, escape(check.name), escape(check.detail), escape(check.mend))
    _out.print(table)
    if any(check.required and not check.ok for check in checks):
        raise Exit("something that every build needs is missing", code=1)


def _say_built(version: Version, file: str, unchanged: bool) -> None:
    """Say which version there is now. file: of it, the one that a user wants."""
    said = "is unchanged" if unchanged else "is built"
    _out.print(f"{version.image} {said}: version {version.name}", highlight=False)
    _out.print(f"  {version.path / file}", highlight=False, soft_wrap=True)


def _print_plan(planned: Plan) -> None:
    table = Table("step", "result", "how", box=None, pad_edge=False)
    for step in planned.steps:
        table.add_row(step.title, "cached" if step.cached else "to do", escape(step.detail))
    _out.print(table)


@_task()
def images(context: Context, site: str = SITE) -> None:
    """List the images and their versions."""
    _, store = _store(site)
    table = Table("image", "version", "", "size", "built", "boots in", "by", box=None, pad_edge=False)
    for image in store.images():
        for version in store.versions(image):
            state = "current" if version.promoted else ""
            try:
                described = version.stored()
            except StoreError as error:
                table.add_row(image, version.name, state, "", "", "", escape(f"damaged: {error.message}"))
                continue
            table.add_row(
                image,
                version.name,
                state,
                _size(version.size),
                f"{described.created:%Y-%m-%d %H:%M}",
                *_booted(described),
            )
    _out.print(table if table.row_count else "no image was built yet: build-golden builds one")


def _booted(described: AnyManifest) -> tuple[str, str]:
    """How long a version took to boot, and what made it."""
    if described.kind == "adopted":
        return "", f"adopted from {described.domain}"
    verification = described.verification
    seconds = f"{verification.running_seconds:.0f} s, {verification.accelerator}"
    return seconds, described.method if described.kind == "disk" else "live system"


@_task({"domain": "the machine, by its name in libvirt; it has to be shut down"}, positional=["domain"])
def images_adopt(
    context: Context, domain: str, image: str | None = None, promote: bool = True, site: str = SITE
) -> None:
    """Make an existing machine's disk a version of an image, for pools to clone."""
    from vdibuild import adopt

    version = adopt.adopt(_site(site), image, domain, promote=promote)
    state = " is current" if version.promoted else ""
    _out.print(f"{version.image} {version.name}{state}: {_size(version.size)}", highlight=False)


@_task()
def images_show(
    context: Context, image: str | None = None, version: str | None = None, site: str = SITE
) -> None:
    """Show a version's manifest."""
    loaded, store = _store(site)
    found = store.get(image or loaded.image(None)[0], version)
    sys.stdout.write(found.stored().model_dump_json(indent=2) + "\n")


@_task()
def images_verify(
    context: Context, image: str | None = None, version: str | None = None, site: str = SITE
) -> None:
    """Check a version's signature and every byte."""
    loaded, store = _store(site)
    verified = store.verify(image or loaded.image(None)[0], version)
    _out.print(
        f"{verified.version.image} {verified.version.name}: {_size(verified.size)} intact, "
        f"signed by {verified.signer}",
        highlight=False,
    )


@_task()
def images_promote(context: Context, version: str, image: str | None = None, site: str = SITE) -> None:
    """Make a version the current one."""
    loaded, store = _store(site)
    promoted = store.promote(image or loaded.image(None)[0], version)
    _out.print(f"{promoted.image}: {promoted.name} is current", highlight=False)


@_task()
def images_rollback(context: Context, image: str | None = None, site: str = SITE) -> None:
    """Make the version before current again."""
    loaded, store = _store(site)
    promoted = store.rollback(image or loaded.image(None)[0])
    _out.print(f"{promoted.image}: {promoted.name} is current", highlight=False)


@_task({"keep": "how many of the newest versions of each image stay"})
def images_gc(context: Context, image: str | None = None, keep: int = 3, site: str = SITE) -> None:
    """Remove old versions that nobody uses, and, for all images, what nobody misses in the cache."""
    from vdibuild import cache

    loaded, store = _store(site)
    for entry in store.gc(image, keep):
        done = "removed" if entry.removed else "kept"
        _out.print(
            f"{done} {entry.image} {entry.name} ({_size(entry.size)}): {entry.reason}", highlight=False
        )
    for gone in cache.clear(loaded.cache_directory, store) if image is None else ():
        _out.print(f"removed {gone.name} ({_size(gone.size)}) from the cache: {gone.reason}", highlight=False)


@_task(
    {
        "source": "a disk image (raw or qcow2) or a block device; it is only read",
        "output": "the qcow2 to write",
        "headroom": "what each file system has free, such as 200MiB, or what it has now if that is less",
        "verify": "boot the result before it appears (--no-verify leaves that out)",
        "memory": "of the machine that boots it, such as 2GiB",
        "boot_seconds": "how long it may take to start",
    },
    positional=["source", "output"],
)
def shrink(
    context: Context,
    source: str,
    output: str,
    headroom: str = "64MiB",
    verify: bool = True,
    memory: str = "1GiB",
    boot_seconds: int = 600,
) -> None:
    """Make the smallest image that holds a Linux disk's content."""
    from vdibuild import host
    from vdibuild.disk import shrink

    done = shrink.shrink(
        Path(source),
        Path(output),
        headroom=_mebibytes("headroom", headroom),
        accelerator=host.accelerator().name,
        boot_seconds=boot_seconds if verify else None,
        memory=_mebibytes("memory", memory),
    )
    _out.print(
        f"{output}: {_size(done.after)} instead of {_size(done.before)}, stored in {_size(done.stored)}",
        highlight=False,
        soft_wrap=True,
    )
    for firmware, seconds in done.started.items():
        _out.print(f"  starts with {firmware.upper()} in {seconds:.0f} s", highlight=False)


@_task(
    {
        "source": "a disk image, a block device, or a directory; / for the running system",
        "output": "the new directory for bundle.tar.zst and bundle.json",
        "name": "the bundle's name; by default the output's",
        "exclude": "a path to leave out, which may have wildcards; may be given several times",
        "one_file_system": "leave out what is mounted below a directory",
    },
    positional=["source", "output"],
    iterable=["exclude"],
)
def bundle_create(
    context: Context,
    source: str,
    output: str,
    name: str = "",
    exclude: list[str] | None = None,
    one_file_system: bool = False,
) -> None:
    """Pack a system into a bundle."""
    from vdibuild import host, packing

    described = packing.pack(
        Path(source),
        Path(output),
        accelerator=host.accelerator().name,
        name=name,
        exclude=exclude or (),
        one_file_system=one_file_system,
    )
    _out.print(f"{output}: {_size(described.size)}, {described.sha256}", highlight=False, soft_wrap=True)


@_task(
    {"bundle": "the bundle's directory", "repository": "a directory, or the URL of a WebDAV server"},
    positional=["bundle", "repository"],
)
def bundle_publish(context: Context, bundle: str, repository: str, site: str = SITE) -> None:
    """Sign and publish a bundle: to a directory, or to a web server by PUT."""
    from vdibuild.repository import publish
    from vdibuild.settings.keys import Keys

    # A template that is packed as it runs has no site file.
    keys = _site(site).keys if Path(site).exists() else Keys()
    described = publish(Path(bundle), repository, keys)
    _out.print(f"{described.name} is published", highlight=False)


@_task(
    {
        "name": "the bundle's name",
        "repository": "a directory, or the URL of a web server",
        "output": "the directory that gets it",
    },
    positional=["name", "repository", "output"],
)
def bundle_get(context: Context, name: str, repository: str, output: str) -> None:
    """Get a bundle; a download that broke off goes on."""
    from vdibuild.repository import get

    described = get(repository, name, Path(output))
    _out.print(f"{output}: {described.name}, {_size(described.size)}", highlight=False, soft_wrap=True)


@_task(
    {
        "bundle": "the bundle's directory",
        "directory": "where to; it is made",
        "devices": "the bundle may hold any device nodes",
    },
    positional=["bundle", "directory"],
)
def bundle_unpack(context: Context, bundle: str, directory: str, devices: bool = False) -> None:
    """Unpack a bundle, when it is whole and harmless."""
    from vdibuild.packing import unpack

    unpack(Path(bundle), Path(directory), devices=devices)


_MACHINE = {
    "name": "the machine's name; what the site file says of it in machines: is taken",
    "image": "the image it is a copy of",
    "version": "the image's version; by default the promoted one",
    "bundle": "instead of an image: a bundle of the repository that the site file names",
    "storage": "the libvirt storage pool that gets its volume",
    "size": "of its disk, such as 20GiB; by default the image's",
    "filesystem": "ext4, xfs or btrfs for /, on a disk that is laid out anew",
    "swap": "such as 1GiB, on a disk that is laid out anew",
    "memory": "such as 2GiB",
    "cpus": "how many processors",
    "network": "a network of the site file",
    "address": "its IPv4 address; next: the first free one; dhcp: any",
    "mac": "its MAC address; by default made from the address",
    "autostart": "start it whenever its host starts",
    "start": "switch it on (--no-start leaves that out)",
    "wait": "wait until its guest agent answers",
}


@_task(_MACHINE, positional=["name"])
def provision(
    context: Context,
    name: str,
    image: str = "",
    version: str = "",
    bundle: str = "",
    storage: str = "",
    size: str = "",
    filesystem: str = "",
    swap: str = "",
    memory: str = "",
    cpus: int = 0,
    network: str = "",
    address: str = "",
    mac: str = "",
    autostart: bool = False,
    start: bool = True,
    wait: bool = False,
    site: str = SITE,
) -> None:
    """Make a machine from an image or a bundle: volume, network entries, domain."""
    from vdibuild import provision

    loaded = _site(site)
    given = {
        "image": image,
        "version": version,
        "bundle": bundle,
        "pool": storage,
        "size": size,
        "filesystem": filesystem,
        "swap": swap,
        "memory": memory,
        "cpus": cpus,
        "network": network,
        "address": address,
        "mac": mac,
        "autostart": autostart,
    }
    machine = loaded.machine(name, {key: value for key, value in given.items() if value})
    done = provision.provision(loaded, name, machine, start=start, wait=wait)
    made = done.made
    _out.print(
        f"{name}: {made.image} {made.version}, volume {made.volume} in {made.pool}, MAC {made.mac}"
        + (f", address {made.address}" if made.address else ""),
        highlight=False,
        soft_wrap=True,
    )
    _out.print(f"  {done.way.name} ({done.way.by}): {done.way.reason}", highlight=False, soft_wrap=True)
    if answered := done.answered:
        said = f"{answered.host} answers at {', '.join(answered.addresses)} after {answered.seconds:.0f} s"
        _out.print(f"  {escape(said)}", highlight=False)


@_task({"name": "the machine's name"}, positional=["name"])
def deprovision(context: Context, name: str, site: str = SITE) -> None:
    """Remove a machine that `provision` made, with all that is on its disk."""
    from vdibuild import provision

    made = provision.deprovision(_site(site), name)
    _out.print(f"{name} is gone, with its volume {made.volume} in {made.pool}", highlight=False)


def _mebibytes(option: str, text: str) -> int:
    """An option's size, such as 2GiB, in MiB."""
    from pydantic import TypeAdapter, ValidationError

    from vdibuild.settings.values import Size

    try:
        return TypeAdapter[int](Size).validate_python(text)
    except ValidationError as error:
        raise VdibuildError(f"--{option}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


@_task()
def pool_serve(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Keep a pool of clean machines, and hand each station one of its own."""
    import asyncio

    from vdibuild.pool import server

    _log_lines()
    loaded = _site(site)
    name, settings = loaded.pool(pool)

    def ready(port: int) -> None:
        _out.print(f"the pool {name} serves stations on port {port}", highlight=False)

    asyncio.run(server.serve(loaded, name, settings, ready))


@_task()
def pool_relay(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Run a pool's relay in the place of the one that runs; pool.serve starts one where there is none."""
    import asyncio

    from vdibuild.pool import relay, relay_process

    _log_lines()
    _, settings = _site(site).pool(pool)
    asyncio.run(relay.run(relay_process.config(settings)))


@_task({"live": "go on, and show what changes"})
def pool_status(context: Context, pool: str | None = None, live: bool = False, site: str = SITE) -> None:
    """Show a pool's machines, and who has them."""
    from vdibuild.pool import server

    name, settings = _site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        if not live:
            _out.print(_status(name, settings, leases))
            return
        with Live(_status(name, settings, leases), console=_out, auto_refresh=False) as shown:
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
        table.add_row(machine.name, machine.state, _duration(now - since), where, machine.version)
    return table


@_task({"number": "how many, the newest first", "station": "only those of a station, by name or address"})
def pool_leases(
    context: Context,
    pool: str | None = None,
    number: int = 50,
    station: str | None = None,
    site: str = SITE,
) -> None:
    """List who had which machine, when, for how long."""
    from vdibuild.pool import server

    name, settings = _site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        found = leases.history(name, number, station)
    _out.print(_history(found) if found else "nobody was offered a machine yet")


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
            _duration(until - lease.linked) if lease.linked else "not used",
            _size(lease.bytes_in) if lease.bytes_in is not None else "",
            _size(lease.bytes_out) if lease.bytes_out is not None else "",
            escape(lease.reason or ""),
        )
    return table


_MACHINE = {"machine": "only this one, by its name, as pool.status shows it, or its lease"}


@_task(_MACHINE)
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
            _out.print(f"{found.name} will be destroyed", highlight=False)
        else:
            _out.print(
                f"{found.name} is {leases.get(found.lease).state}: it ends with its session", highlight=False
            )


@_task(_MACHINE)
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
    _out.print(f"{found.name} is paused: nobody gets it until pool.resume", highlight=False)


@_task(_MACHINE)
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
    _out.print(f"{found.name} is clean again", highlight=False)


@contextlib.contextmanager
def _machine(site: str, pool: str | None, machine: str) -> Iterator[tuple[Leases, Machine]]:
    """The leases of a pool, and a living machine of it."""
    from vdibuild.pool import server

    name, settings = _site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        yield leases, leases.find(name, machine)


def _set_mode(site: str, pool: str | None, mode: str) -> None:
    from vdibuild.pool import server
    from vdibuild.pool.leases import Mode

    name, settings = _site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        leases.set_mode(name, Mode(mode))
    _out.print(f"the pool {name} is {mode}", highlight=False)


@_task({"clean": "how many clean machines to keep", "maximum": "how many machines at most"})
def pool_resize(
    context: Context,
    pool: str | None = None,
    clean: int | None = None,
    maximum: int | None = None,
    site: str = SITE,
) -> None:
    """Set a pool's size until told otherwise; without numbers, to what the site file says."""
    from vdibuild.pool import server

    name, settings = _site(site).pool(pool)
    with contextlib.closing(server.leases(name, settings)) as leases:
        leases.resize(name, clean, maximum)


@_task({"machine": "its name, as pool.status shows it, or its lease"})
def pool_destroy(context: Context, machine: str, pool: str | None = None, site: str = SITE) -> None:
    """Destroy one machine, and end its session; the service does it within a second."""
    with _machine(site, pool, machine) as (leases, found):
        leases.end(found.lease, "destroyed by the administrator")
    _out.print(f"{found.name} will be destroyed", highlight=False)


@_task({"station": "the station's name"})
def pool_enrol(context: Context, station: str, pool: str | None = None, site: str = SITE) -> None:
    """Give a station a new token, which goes into its kiosk image; it is shown only once."""
    from vdibuild.pool import stations

    name, settings = _site(site).pool(pool)
    if settings.desk is None:
        raise Exit(f"error: the pool {name} has no desk\n  describe it: pools: {name}: desk:", code=1)
    sys.stdout.write(stations.enrol(settings.desk.stations, station) + "\n")


@_task()
def pool_clear(context: Context, pool: str | None = None, site: str = SITE) -> None:
    """Destroy everything of a pool that is not being served, and nothing else."""
    import asyncio

    from vdibuild.pool import server

    loaded = _site(site)
    name, settings = loaded.pool(pool)
    count = asyncio.run(server.clear(loaded, name, settings))
    _out.print(f"the pool {name} is empty: {count} machines were destroyed", highlight=False)


@_task(
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

    history = demo.run(_site(site), image, Path(pictures), kiosk=kiosk)
    _out.print(_history(history))
    _out.print(f"pictures of the stations' screens: {pictures}", highlight=False, soft_wrap=True)


@_task({"yes": "make the changes without asking"})
def hypervisor_setup(context: Context, yes: bool = False, site: str = SITE) -> None:
    """Make this host one for pools: the stations' DHCP, time and firewall, the machines' networks."""
    from vdibuild import hypervisor

    changes = hypervisor.changes(_site(site))
    if not changes:
        _out.print("nothing has to be changed", highlight=False)
        return
    for change in changes:
        _out.print(change.what, style="bold", highlight=False, markup=False, soft_wrap=True)
        sys.stdout.write(change.difference)
    sys.stdout.flush()
    if not yes and _out.input("Type yes to make these changes: ").strip() != "yes":
        raise VdibuildError("nothing was changed")
    for change in changes:
        with progress.step(change.what):
            left = change.make()
        if left:
            _out.print(left, highlight=False, markup=False, soft_wrap=True)


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


def _duration(duration: timedelta) -> str:
    return str(timedelta(seconds=max(0, int(duration.total_seconds()))))


def _size(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _namespace() -> Collection:
    namespace = Collection()
    namespace.add_task(build_golden, "build-golden")
    namespace.add_task(build_installer, "build-installer")
    namespace.add_task(build_kiosk_iso, "build-kiosk-iso")
    namespace.add_task(write_card, "write-card")
    kiosks = Collection("kiosk")
    kiosks.add_task(kiosk_configure, "configure")
    kiosks.add_task(kiosk_cards, "cards")
    namespace.add_collection(kiosks)
    namespace.add_task(show_kickstart, "kickstart")
    namespace.add_task(doctor)
    windows = Collection("windows")
    windows.add_task(windows_answers, "answers")
    namespace.add_collection(windows)
    namespace.add_task(shrink)
    bundles = Collection("bundle")
    bundles.add_task(bundle_create, "create", default=True)
    bundles.add_task(bundle_publish, "publish")
    bundles.add_task(bundle_get, "get")
    bundles.add_task(bundle_unpack, "unpack")
    namespace.add_collection(bundles)
    namespace.add_task(provision)
    namespace.add_task(deprovision)
    site = Collection("site")
    site.add_task(site_schema, "schema")
    namespace.add_collection(site)
    versions = Collection("images")
    versions.add_task(images, "list", default=True)
    versions.add_task(images_adopt, "adopt")
    versions.add_task(images_show, "show")
    versions.add_task(images_verify, "verify")
    versions.add_task(images_promote, "promote")
    versions.add_task(images_rollback, "rollback")
    versions.add_task(images_gc, "gc")
    namespace.add_collection(versions)
    hypervisors = Collection("hypervisor")
    hypervisors.add_task(hypervisor_setup, "setup")
    namespace.add_collection(hypervisors)
    pools = Collection("pool")
    pools.add_task(pool_serve, "serve")
    pools.add_task(pool_relay, "relay")
    pools.add_task(pool_status, "status")
    pools.add_task(pool_leases, "leases")
    pools.add_task(pool_drain, "drain")
    pools.add_task(pool_pause, "pause")
    pools.add_task(pool_resume, "resume")
    pools.add_task(pool_resize, "resize")
    pools.add_task(pool_destroy, "destroy")
    pools.add_task(pool_clear, "clear")
    pools.add_task(pool_enrol, "enrol")
    pools.add_task(pool_demo, "demo")
    namespace.add_collection(pools)
    return namespace


namespace = _namespace()
