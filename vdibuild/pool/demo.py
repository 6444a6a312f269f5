"""A pool on one host, shown step by step, with a libvirt, a network, a relay and stations of its own.

    station-1  10.9.0.11 ──┐
    station-2  10.9.0.12 ──┼── 10.9.0.1  signal port, SPICE port, machines without a network
    kiosk      10.9.0.13 ──┘

The stations do what the old client does: `ncat`, then `remote-viewer`. The kiosk, which is there when that is
wanted, is a machine that starts from the kiosk's ISO. Everything is in namespaces that end
with this process; the host's libvirt and network are not touched. Root is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from vdibuild import golden, host, private_libvirt, process, progress, scratch
from vdibuild import kiosk as kiosks
from vdibuild.errors import HostError, StoreError, VerificationError
from vdibuild.install import domain as domains
from vdibuild.libvirt_connection import connected
from vdibuild.live import ISO
from vdibuild.pool import demo_kiosk, screens
from vdibuild.pool.leases import Leases, Machine, State
from vdibuild.private_libvirt import PrivateLibvirt
from vdibuild.settings.live_systems import KIOSK
from vdibuild.site import Site
from vdibuild.store import Store, Version

POOL = "demo"
TYPED = "nobody will read this"
"""What a person types; it ends with the machine."""

_SERVER = "10.9.0.1"
_STATIONS = {"station-1": "10.9.0.11", "station-2": "10.9.0.12"}
_KIOSK = "10.9.0.13"
_BRIDGE = "stations"
_SIGNAL_PORT, _SPICE_PORT = 5905, 5906
_CLEAN = 2
_MAXIMUM = 3
_SIZES = {
    "memory": "512MiB",
    "cores": 1,
    "disk": "1GiB",
    "reserve_memory": "256MiB",
    "reserve_disk": "256MiB",
}
_OFFER_SECONDS = 300

_BOOT_SECONDS = 600.0
_SECONDS = 120.0
_POLL_SECONDS = 0.2
_LIGHT_PIXELS = 10  # fewer than a letter has, on average; a blinking cursor has less than two letters
_VIEWED = range(64, screens.HEIGHT)  # the lines of a station's screen that are the machine's: not the title
_KIOSK_VIEWED = range(390)  # of the kiosk's: in its middle is the pointer

_COMMAND = "from vdibuild.console import program; program.run()"
_CONNECT = "RULE ADDED, CONNECT NOW!"
_VIEWER = ("--spice-disable-audio", "--spice-disable-effects=animation", "-k", "--kiosk-quit=on-disconnect")


def run(site: Site, image: str | None, pictures: Path, *, kiosk: bool = False) -> list[Machine]:
    """Show a pool of an image, by default the site's first; it is built unless it is there.

    pictures: the directory that gets the stations' screens as PNG. kiosk: with a station that starts from the
    kiosk's ISO, which is built, too, unless it is there. Returns who had which machine, the newest first.
    Raises VerificationError when the pool does not do what it should, HostError, StoreError.
    """
    if os.geteuid() != 0:
        raise HostError("the demo needs root, for namespaces and libvirt", "run it with sudo")
    name, _ = site.image(image)
    _have(site, name, partial(golden.build, site, name))
    iso = _have(site, KIOSK, partial(kiosks.build, site)).path / ISO if kiosk else None
    pictures.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch.beside(Path(tempfile.gettempdir()) / "vdibuild-demo"))
        with progress.step("a libvirt and a network of its own"):
            (directory / "libvirt").mkdir()
            # As root QEMU reads the image wherever it is; it sees no network, and no process but the demo's.
            settings = 'user = "root"\ngroup = "root"\n'
            system = stack.enter_context(
                private_libvirt.running(directory / "libvirt", own_network=True, settings=settings)
            )
            _make_bridge(system)
            stations = [
                stack.enter_context(_station(system, name, address, directory))
                for name, address in _STATIONS.items()
            ]
        _write_site(site, name, system, directory)
        (directory / POOL).mkdir()
        leases = Leases(f"sqlite:///{directory / POOL / 'leases.db'}")
        stack.callback(leases.close)
        with _Service(system, directory) as service:
            scene = _Scene(system, leases, service, directory, pictures)
            _show(scene, *stations)
            if iso:
                _show_kiosk(scene, site, iso)
        return leases.history(POOL, limit=len(_STATIONS) + 1 + kiosk)


@dataclass(frozen=True)
class _Scene:
    """Where it all happens. directory: of the demo. pictures: where the stations' screens go."""

    system: PrivateLibvirt
    leases: Leases
    service: _Service
    directory: Path
    pictures: Path


def _show(scene: _Scene, first: _Station, second: _Station) -> None:
    with progress.step("the pool starts its machines") as step:
        clean = _wait_until_clean(scene, _CLEAN)
        step.note(f"clean: {', '.join(machine.name for machine in clean)}")
    with progress.step("two people sit down at once") as step:
        for station in (first, second):
            station.asks()
        for station in (first, second):
            station.gets_a_machine(scene)
        seen = ", ".join(f"{station.name} sees {_of(scene, station).name}" for station in (first, second))
        step.note(seen)
        if _of(scene, first).lease == _of(scene, second).lease:
            raise VerificationError("both stations got the same machine")
    with progress.step(f"{first.name} types {TYPED!r}"):
        first.types(scene, TYPED)
        _sees_its_machine(scene, second, f"{second.name}-sees-nothing-of-it", _VIEWED)
        typed, other = (screens.written(_screen(scene, _of(scene, one))) for one in (first, second))
        if typed - other <= len(TYPED) * _LIGHT_PIXELS:
            raise VerificationError(f"{second.name} sees what {first.name} typed")
    with progress.step("the service is killed and started again; sessions go on") as step:
        scene.service.kill()
        scene.service.start()
        for station in (first, second):
            _sees_its_machine(scene, station, f"{station.name}-goes-on", _VIEWED)
        step.note(f"{len(_in_use(scene))} sessions")
    with progress.step(f"{first.name} leaves: its machine and all that was written are gone") as step:
        left = _of(scene, first)
        first.leaves()
        _wait("the machine is gone", lambda: scene.leases.get(left.lease).state == State.GONE, _SECONDS)
        if (scene.directory / POOL / "machines" / left.lease).exists() or _runs(scene, left):
            raise VerificationError(f"something of {left.name} is left")
        step.note(left.name)
    with progress.step("a clean machine is ready for the next one") as step:
        step.note(_wait_until_clean(scene, 1)[0].name)
    with progress.step(f"{first.name}: somebody else sits down") as step:
        first.asks()
        first.gets_a_machine(scene, "next-person")
        step.note(f"{first.name} sees {_of(scene, first).name}")


def _show_kiosk(scene: _Scene, site: Site, iso: Path) -> None:
    with demo_kiosk.started(
        scene.system,
        iso,
        memory=site.kiosk.memory,
        accelerator=host.accelerator(cache=site.cache_directory).name,
        bridge=_BRIDGE,
        server=_SERVER,
        address=_KIOSK,
        directory=scene.directory,
    ) as kiosk:
        with progress.step("a station starts from the kiosk's ISO"):
            _wait(
                "the kiosk shows its first screen", kiosk.is_up, site.kiosk.boot_seconds, scene.service.check
            )
            kiosk.picture(scene.pictures / "kiosk-welcome.png")
        with progress.step("somebody presses a key there, and gets a machine") as step:
            _wait("the kiosk is put through", kiosk.begins, _BOOT_SECONDS, scene.service.check)
            _wait_until_let_in(scene, kiosk)
            _sees_its_machine(scene, kiosk, kiosk.name, _KIOSK_VIEWED)
            step.note(f"{kiosk.name} sees {_of(scene, kiosk).name}")


class _Service:
    """`pool.serve`, which can be killed and started again; its log is in the demo's directory."""

    def __init__(self, system: PrivateLibvirt, directory: Path) -> None:
        self._system = system
        self._directory = directory
        self._log = directory / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            process.stop(self._process)

    def start(self) -> None:
        """Returns when stations are served."""
        argv = ["env", f"--chdir={self._directory}", sys.executable, "-c", _COMMAND, "pool.serve"]
        with self._log.open("wb") as log:
            self._process = process.start(
                self._system.inside(argv),
                env={"PYTHONPATH": str(Path(__file__).parents[2])},  # the same code as this
                stdout=log,
            )
        _wait("the pool is served", lambda: "serves stations" in self._log.read_text(), _SECONDS, self.check)

    def kill(self) -> None:
        """As `kill -9` does; returns when nothing of it is left."""
        if self._process:
            group = self._process.pid
            os.killpg(group, signal.SIGKILL)
            self._process.wait()
            _wait("the killed service is gone", lambda: not _lives(group), _SECONDS)

    def check(self) -> None:
        """Raise VerificationError when it has ended."""
        if self._process and self._process.poll() is not None:
            said = "\n".join(self._log.read_text(errors="replace").splitlines()[-process.TAIL_LINES :])
            raise VerificationError(f"pool.serve ended:\n{said}")


class _Place(Protocol):
    """Where somebody sits: a station, or the kiosk."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    def picture(self, file: Path) -> bool: ...


class _Station:
    """A person's place: a screen, and the old client's commands, in a network of its own."""

    def __init__(self, name: str, address: str, enter: Sequence[str], display: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self._enter = enter
        self._display = display
        self._directory = directory
        self._signals: subprocess.Popen[bytes] | None = None
        self._viewer: subprocess.Popen[bytes] | None = None

    def asks(self) -> None:
        """Ask for a machine."""
        argv = [*self._enter, "ncat", "-i", "1", _SERVER, str(_SIGNAL_PORT)]
        with self._heard.open("wb") as heard:
            self._signals = process.start(argv, stdout=heard)

    def gets_a_machine(self, scene: _Scene, picture: str = "") -> None:
        """Wait until it is told to connect, and see the machine."""
        _wait(
            f"{self.name} is told to connect",
            lambda: _CONNECT in self._heard.read_text(errors="replace"),
            _SECONDS,
            scene.service.check,
        )
        argv = [*self._enter, "remote-viewer", f"spice://{_SERVER}:{_SPICE_PORT}", *_VIEWER]
        home = self._directory / self.name
        home.mkdir(exist_ok=True)
        variables = {"DISPLAY": self._display, "GDK_BACKEND": "x11", "HOME": str(home)}
        self._viewer = process.start(argv, env=variables, stdout=subprocess.DEVNULL)
        _wait_until_let_in(scene, self)
        _sees_its_machine(scene, self, picture or self.name, _VIEWED)

    def picture(self, file: Path) -> bool:
        """Save its screen as PNG."""
        screens.take(self._display, file)
        return True

    def types(self, scene: _Scene, text: str) -> None:
        """Type something, and wait until the machine shows that much more."""
        machine = _of(scene, self)
        before, after = (self._directory / f"{name}.png" for name in ("before", "after"))

        def arrived() -> bool:
            with connected(scene.system.uri) as connection:
                domain = connection.lookupByUUIDString(machine.lease)
                if not domains.screenshot(connection, domain, after):
                    return False
            return screens.written(after) - screens.written(before) > len(text) * _LIGHT_PIXELS

        with connected(scene.system.uri) as connection:
            domains.screenshot(connection, connection.lookupByUUIDString(machine.lease), before)
        # Without a window manager nobody else gives the viewer the keyboard.
        window = ["search", "--sync", "--onlyvisible", "--class", "remote-viewer", "windowfocus", "--sync"]
        # In one command with the search, xdotool would send events to the window, which GTK does not take.
        keys = ["mousemove", "512", "400", "click", "1", "type", "--delay", "50", text]
        for argv in (window, keys):
            process.run(["xdotool", *argv], env={"DISPLAY": self._display}, deadline=_SECONDS)
        _wait(f"{machine.name} shows what was typed", arrived, _SECONDS, scene.service.check)
        _sees_its_machine(scene, self, f"{self.name}-types", _VIEWED)

    def leaves(self) -> None:
        """End the viewer, as its window's button does."""
        for running in (self._viewer, self._signals):
            if running:
                process.stop(running)
        self._viewer = self._signals = None

    @property
    def _heard(self) -> Path:
        return self._directory / f"{self.name}.heard"


@contextlib.contextmanager
def _station(system: PrivateLibvirt, name: str, address: str, directory: Path) -> Iterator[_Station]:
    """A station whose network is a cable to the demo's bridge."""
    with contextlib.ExitStack() as stack:
        holding = process.start(
            ["nsenter", f"--net=/proc/{system.pid}/ns/net", "unshare", "--net", "sleep", "infinity"],
            stdout=subprocess.DEVNULL,
        )
        stack.callback(process.stop, holding)
        _wait("the station's network is there", lambda: _comm(holding.pid) == "sleep", _SECONDS)
        enter = ["nsenter", f"--net=/proc/{holding.pid}/ns/net", "--"]
        cable = ["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(holding.pid)]
        for argv in (cable, ["link", "set", name, "master", _BRIDGE, "up"]):
            process.run(["nsenter", f"--net=/proc/{system.pid}/ns/net", "--", "ip", *argv])
        for argv in (["address", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            process.run([*enter, "ip", *argv])
        station = _Station(name, address, enter, stack.enter_context(screens.x_server()), directory)
        stack.callback(station.leaves)
        yield station


def _make_bridge(system: PrivateLibvirt) -> None:
    for argv in (
        ["link", "set", "lo", "up"],
        ["link", "add", _BRIDGE, "type", "bridge"],
        ["address", "add", f"{_SERVER}/24", "dev", _BRIDGE],
        ["link", "set", _BRIDGE, "up"],
    ):
        process.run(["nsenter", f"--net=/proc/{system.pid}/ns/net", "--", "ip", *argv])


def _have(site: Site, name: str, build: Callable[[], object]) -> Version:
    """The current version of something, which is built unless it is there."""
    versions = Store(site.artifacts_directory, site.keys)
    try:
        version = versions.get(name)
    except StoreError:
        build()
        return versions.get(name)
    with progress.step(f"the image {name}") as step:
        step.note(f"version {version.name} is there")
    return version


def _write_site(site: Site, image: str, system: PrivateLibvirt, directory: Path) -> None:
    pool = {
        "image": image,
        "clean": _CLEAN,
        "maximum": _MAXIMUM,
        **_SIZES,
        "directory": str(directory),
        "listen": _SERVER,
        "signal_port": _SIGNAL_PORT,
        "spice_port": _SPICE_PORT,
        "offer_seconds": _OFFER_SECONDS,
    }
    text = site_file(site, image, system.uri, pool)
    (directory / "vdibuild.yaml").write_text(text, encoding="utf-8")


def site_file(site: Site, image: str, uri: str, pool: Mapping[str, object]) -> str:
    """A site file with one pool, POOL, of a site's image, and nothing else. uri: libvirt's. JSON is YAML."""
    settings = site.images[image]
    described = {
        "images": {
            image: {"family": settings.family, "release": settings.release, "kickstart": settings.kickstart}
        },
        "artifacts": str(site.artifacts_directory.resolve()),
        "keys": json.loads(site.keys.model_dump_json()),
        "libvirt": uri,
        "pools": {POOL: pool},
    }
    return json.dumps(described, indent=2)


def _wait_until_clean(scene: _Scene, number: int) -> list[Machine]:
    def clean() -> list[Machine]:
        return [one for one in scene.leases.living(POOL) if one.state == State.CLEAN]

    _wait("clean machines are ready", lambda: len(clean()) >= number, _BOOT_SECONDS, scene.service.check)
    return clean()


def _in_use(scene: _Scene) -> list[Machine]:
    return [one for one in scene.leases.living(POOL) if one.state == State.IN_USE]


def _wait_until_let_in(scene: _Scene, place: _Place) -> None:
    def let_in() -> bool:
        return any(machine.address == place.address for machine in _in_use(scene))

    _wait(f"{place.name} is let in", let_in, _SECONDS, scene.service.check)


def _sees_its_machine(scene: _Scene, place: _Place, picture: str, lines: range) -> None:
    """Save a picture of a station's screen as soon as that shows what its machine shows.

    lines: of its screen, that are the machine's.
    """
    file = scene.pictures / f"{picture}.png"
    machine = _of(scene, place)

    def seen() -> bool:
        own = _screen(scene, machine)
        with connected(scene.system.uri) as connection:
            domain = connection.lookupByUUIDString(machine.lease)
            if not domains.screenshot(connection, domain, own):
                return False
        return place.picture(file) and screens.alike(own, file, lines)

    _wait(f"{place.name} sees {machine.name}", seen, _SECONDS, scene.service.check)


def _of(scene: _Scene, station: _Place) -> Machine:
    """The machine that a station has."""
    for machine in _in_use(scene):
        if machine.address == station.address:
            return machine
    raise VerificationError(f"{station.name} has no machine any more")


def _screen(scene: _Scene, machine: Machine) -> Path:
    """Where the last picture of a machine's own screen is."""
    return scene.directory / f"{machine.name}.png"


def _runs(scene: _Scene, machine: Machine) -> bool:
    with connected(scene.system.uri) as connection:
        return machine.lease in {domain.UUIDString() for domain in connection.listAllDomains()}


def _lives(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _comm(pid: int) -> str:
    """What a process runs (proc_pid_comm(5))."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _wait(
    what: str, condition: Callable[[], bool], seconds: float, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until something is so. Raises VerificationError when it is not in time, and what check raises."""
    end = time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > end:
            raise VerificationError(f"not seen within {seconds:.0f} s: {what}")
        time.sleep(_POLL_SECONDS)
