"""The kiosk beside live-build's of the same packages; its ISO beside xorriso's, its cards beside dd's.

`./inv bench.kiosk`, or `python -m tests.bench.kiosk`. docs/benchmarks.md says what is measured and how; the
last table is written into it, and every single measurement to artifacts/bench/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from qemu.qmp import QMPClient

from tests.bench import livebuild, mirror, peers, report
from tests.bench.golden import this_machine
from tests.bench.mirror import Mirror
from vdibuild import (
    __version__,
    bootstrap,
    families,
    host,
    kiosk,
    machine,
    process,
    progress,
    resources,
    tree,
)
from vdibuild import site as sites
from vdibuild.errors import HostError, VerificationError
from vdibuild.live import ISO, card, grub, iso, squashfs, verification
from vdibuild.live.iso import Content
from vdibuild.machine import Console, Hardware
from vdibuild.settings.live_systems import KIOSK
from vdibuild.site import Site
from vdibuild.verify import FAILURES

_PROJECT = Path(__file__).parents[2]
_DOCUMENT = _PROJECT / "docs/benchmarks.md"
_MARK = "bench.kiosk"

OURS, THEIRS = "vdibuild", livebuild.NAME
_NAMES = (OURS, THEIRS)
_TOOLS = ("live-build", "debootstrap", "xorriso", "mmdebstrap", "squashfs-tools", "qemu-system-x86")

_MEMORY = 1024  # MiB of the machine that both are started in
_BOOT_SECONDS = 600.0
_SETTLED_SECONDS = 10.0
"""How long a station has shown its first screen when its memory is looked at."""
_ATTEMPTS = 3
_MIB = 1 << 20

_UP = re.compile(verification.UP)
_FAILED = re.compile("|".join(f"(?:{pattern})" for pattern in FAILURES), re.MULTILINE)
_PROGRAMS = "usr/lib/python3/dist-packages/vdibuild"
"""vdibuild's own modules in a station, which no package brings."""
_SETTINGS_TYPE = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
"""The type of the partition for settings: Microsoft's "basic data"."""


@dataclass(frozen=True)
class Boot:
    """One start. seconds: from power-on to the first screen. used: MiB of memory that the system then has in
    use, without what it would give back at once (MemTotal less MemAvailable).
    """

    seconds: float
    used: float


@dataclass
class Results:
    """All that was measured, as it is written to artifacts/bench. Times in seconds, sizes in bytes.

    missing: packages to install for the peer. builds, sizes, boots: by builder. steps: of our builds.
    packages: how many each has. authoring: by pycdlib and by xorriso. cards: written and compared, by us and
    by dd and cmp.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    missing: list[str]
    builds: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    boots: dict[str, list[Boot]] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    packages: dict[str, int] = field(default_factory=dict)
    authoring: dict[str, list[float]] = field(default_factory=dict)
    cards: dict[str, list[float]] = field(default_factory=dict)


def main(builds: int = 1, runs: int = 3, site_file: Path = _PROJECT / sites.DEFAULT_NAME) -> None:
    """Measure, print the tables, and write them to docs/benchmarks.md and the runs to artifacts/bench.

    builds: how often both are built. runs: how often all else is measured.
    """
    if os.geteuid() != 0:
        raise HostError("live-build needs root", "run this as root, on a machine that nobody else uses")
    given = sites.load(site_file)
    results = Results(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        machine=this_machine(),
        versions={OURS: __version__}
        | {name: found for name in _TOOLS if (found := peers.package_version(name))},
        missing=livebuild.missing(),
    )
    bench = given.artifacts_directory / "bench"
    bench.mkdir(parents=True, exist_ok=True)
    family = families.get(given.kiosk.family)
    archives = {role: url for role, url in family.mirrors(given.kiosk).items() if url}
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=given.artifacts_directory) as work,
        mirror.serving(archives, bench / "mirror") as served,
        progress.logging_to(bench / "kiosk.log"),
    ):
        Bench(given, served, Path(work), results).run(builds, runs)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    (bench / f"kiosk-{stamp}.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    _publish(results)


class Bench:
    """One run of the benchmark."""

    def __init__(self, given: Site, served: Mirror, work: Path, results: Results) -> None:
        self._served = served
        self._work = work
        self._results = results
        mirrored = {"mirror": served.urls["main"], "security_mirror": served.urls.get("security")}
        self._site = given.model_copy(
            update={
                "artifacts": work / "artifacts",
                "cache": work / "cache",
                "kiosk": given.kiosk.model_copy(update=mirrored),
            }
        )
        self._media = {name: work / f"{name}.iso" for name in _NAMES}

    def run(self, builds: int, runs: int) -> None:
        """Measure all of it so many times, in turn."""
        for _ in range(builds):
            self.build_ours()
            if not self._results.missing:
                self.build_theirs()
        for number in range(runs):
            with progress.step(f"round {number + 1} of {runs}"):
                for name in self._builders:
                    self.boot(name)
                self.author()
                self.write_cards()

    @property
    def _builders(self) -> Sequence[str]:
        return [name for name in _NAMES if name in self._results.builds]

    # Builds

    def build_ours(self) -> None:
        """A cold build, as `build-kiosk-iso` does it."""

        def build() -> float:
            for directory in (self._site.artifacts_directory, self._site.cache_directory):
                tree.remove(directory)
            self._site.artifacts_directory.mkdir()
            began = time.monotonic()
            made = kiosk.build(self._site).version
            seconds = time.monotonic() - began
            described = made.described()
            self._results.steps.append(described.timings)
            self._results.packages[OURS] = len(described.packages)
            shutil.copyfile(made.path / ISO, self._media[OURS])
            return seconds - described.timings["verification"]

        self._note_build(OURS, build)

    def build_theirs(self) -> None:
        """The same system by live-build."""
        task = self._task()
        directory = self._work / THEIRS

        def build() -> float:
            with peers.working(directory) as work:
                began = time.monotonic()
                made = livebuild.build(task, work)
                seconds = time.monotonic() - began
                made.replace(self._media[THEIRS])
                listed = (work / "chroot.packages.live").read_text().splitlines()
                self._results.packages[THEIRS] = len(listed)
            return seconds

        self._note_build(THEIRS, build)

    def _note_build(self, name: str, build: Callable[[], float]) -> None:
        """A build during which the mirror had everything; one that had to wait for more is repeated."""
        for _ in range(_ATTEMPTS):
            os.sync()
            self._served.traffic.reset()
            with progress.step(name):
                seconds = build()
            if not self._served.traffic.fetched:
                break
            progress.note("again: the mirror had to fetch something")
        else:
            raise HostError("the mirror's content changes all the time", "try again later")
        self._results.builds.setdefault(name, []).append(seconds)
        self._results.sizes.setdefault(name, []).append(self._media[name].stat().st_size)

    def _task(self) -> livebuild.Task:
        """What our last build was made of."""
        settings = self._site.kiosk
        recipe = bootstrap.read_recipe(self._site, KIOSK, settings)
        excluded, kept = peers.left_out(recipe.packages)
        overlays = [resources.find("overlays", name, self._site.directory) for name in settings.overlays]
        return livebuild.Task(
            recipe=recipe,
            release=settings.release,
            mirror=self._served.urls["main"],
            security=self._served.urls.get("security", ""),
            packages=tuple(settings.packages),
            trees=(*overlays, self._programs()),
            compression=squashfs.Compression(
                settings.compression.method, settings.compression.level, kiosk.KIND.block
            ),
            excluded_paths=excluded,
            kept_paths=kept,
        )

    def _programs(self) -> Path:
        """vdibuild's own programs, as our last build has them."""
        programs = self._work / "programs"
        tree.remove(programs)
        argv = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(programs)]
        process.run([*argv, str(self._extracted() / "LiveOS/squashfs.img"), _PROGRAMS])
        return programs

    def _extracted(self) -> Path:
        """The files of our last build's ISO."""
        files = self._work / "files"
        tree.remove(files)
        process.run(
            ["xorriso", "-osirrox", "on", "-indev", str(self._media[OURS]), "-extract", "/", str(files)]
        )
        return files

    # Starts

    def boot(self, name: str) -> None:
        """Start an ISO as a CD, with BIOS."""
        with progress.step(f"start {name}'s"):
            seen = asyncio.run(_boot(self._media[name], self._work))
        self._results.boots.setdefault(name, []).append(seen)

    # The ISO and the card

    def author(self) -> None:
        """Write the ISO of the same files, boot images and partitions by pycdlib and by xorriso."""
        files = self._extracted()
        # Both make it anew.
        (files / "boot/boot.cat").unlink()
        bios, esp = files / "boot/grub/eltorito.img", files / "boot/grub/efi.img"
        settings = self._settings()
        hybrid = next((self._site.cache_directory / "steps").glob(f"*/tree{grub.DIRECTORY}/boot_hybrid.img"))
        output = self._work / "authored.iso"
        entries = [entry for entry in files.rglob("*") if entry.is_file() and entry not in (bios, esp)]
        content = Content(
            label="BENCH",
            files={f"/{entry.relative_to(files)}": entry for entry in entries},
            bios=bios,
            hybrid=hybrid,
            esp=esp,
            settings=settings,
        )
        argv = ["xorriso", "-as", "mkisofs", "-quiet", "-iso-level", "3", "-R", "-J", "-V", "BENCH"]
        argv += ["-b", "boot/grub/eltorito.img", "-c", "boot/boot.cat", "-no-emul-boot"]
        argv += ["-boot-load-size", "4", "-boot-info-table", "--grub2-boot-info"]
        argv += ["--grub2-mbr", str(hybrid), "-eltorito-alt-boot"]
        argv += ["-e", "boot/grub/efi.img", "-no-emul-boot"]
        argv += ["-append_partition", "2", "0xef", str(esp)]
        argv += ["-append_partition", "3", _SETTINGS_TYPE, str(settings), "-appended_part_as_gpt"]
        argv += ["-o", str(output), str(files)]
        ways: dict[str, Callable[[], object]] = {
            "pycdlib": lambda: iso.write(content, output, 0),
            "xorriso": lambda: process.run(argv),
        }
        for name, work in ways.items():
            os.sync()
            with progress.step(f"an ISO by {name}"):
                self._results.authoring.setdefault(name, []).append(_timed(work))
            output.unlink()
        tree.remove(files)

    def _settings(self) -> Path:
        """The partition for settings of our last build."""
        span = kiosk.place(self._media[OURS])
        image = self._work / "settings.img"
        with self._media[OURS].open("rb") as file:
            file.seek(span.start)
            image.write_bytes(file.read(span.length))
        return image

    def write_cards(self) -> None:
        """Write our ISO to a card, and compare all of it: write-card's way, and with dd and cmp."""
        medium = self._media[OURS]
        size = medium.stat().st_size

        def dd(device: Path) -> None:
            argv = ["dd", f"if={medium}", f"of={device}", "bs=4M", "conv=fsync", "status=none"]
            process.run(argv)
            process.run(["blockdev", "--flushbufs", str(device)])
            process.run(["cmp", f"--bytes={size}", str(medium), str(device)])

        def ours(device: Path) -> None:
            card.write(medium, [device], {})

        for name, way in {"write-card": ours, "dd, cmp": dd}.items():
            with self._card(size) as device:
                os.sync()
                with progress.step(f"a card by {name}"):
                    self._results.cards.setdefault(name, []).append(_timed(partial(way, device)))

    @contextlib.contextmanager
    def _card(self, size: int) -> Iterator[Path]:
        """A loop device of a file that is on the disk, past this host's caches."""
        file = self._work / "card"
        process.run(["fallocate", "--length", str(size), str(file)])
        argv = ["losetup", "--find", "--show", "--direct-io=on", str(file)]
        device = process.run(argv, capture=True).stdout.strip()
        try:
            yield Path(device)
        finally:
            process.run(["losetup", "--detach", device])
            file.unlink()


async def _boot(medium: Path, work: Path) -> Boot:
    """Start a medium, and look at its memory when it is up. Raises VerificationError."""
    hardware = Hardware("bios", _MEMORY, host.accelerator().name, medium="cdrom")
    channels = {name: socket.socketpair() for name in ("monitor", "agent", "console")}
    drive = machine._read_only(medium, "raw", "cdrom")
    ends = {name: theirs.fileno() for name, (_, theirs) in channels.items()}
    argv = [*machine.command(hardware, drive, work, ends), "-device", "virtio-balloon-pci,id=balloon"]
    began = time.monotonic()
    qemu = process.start(argv, stdout=subprocess.DEVNULL, pass_fds=tuple(ends.values()))
    console, monitor = Console("station"), QMPClient("station")
    try:
        for _, theirs in channels.values():
            theirs.close()
        output, writer = await asyncio.open_unix_connection(sock=channels["console"][0])
        following = asyncio.create_task(console.follow(output))
        await monitor.connect(channels["monitor"][0])
        try:
            await asyncio.wait_for(_up(console), _BOOT_SECONDS)
            seconds = time.monotonic() - began
            return Boot(seconds, await _used(monitor))
        except TimeoutError:
            raise VerificationError(
                f"{medium} did not come up and tell of its memory in {_BOOT_SECONDS:.0f} s",
                "",
                console.tail(),
            ) from None
        finally:
            await monitor.disconnect()
            following.cancel()
            writer.close()
    finally:
        process.stop(qemu)
        channels["agent"][0].close()


async def _up(console: Console) -> None:
    """Wait until the first screen is painted. Raises VerificationError when the system says it cannot."""
    either = re.compile(f"{_UP.pattern}|{_FAILED.pattern}", re.MULTILINE)
    seen = await console.shows(either)
    if not _UP.fullmatch(seen[0]):
        raise VerificationError(f"it did not come up: {seen[0]}", "", console.tail())


async def _used(monitor: QMPClient) -> float:
    """MiB of memory in use, as the kernel tells the balloon (virtio 1.2, 5.5.6.3), when all has settled."""
    place = {"path": "/machine/peripheral/balloon"}
    await asyncio.sleep(_SETTLED_SECONDS)
    asked = time.time()
    polling = {**place, "property": "guest-stats-polling-interval", "value": 1}
    await monitor.execute("qom-set", polling)
    async with asyncio.timeout(_BOOT_SECONDS):
        while True:
            said = await monitor.execute("qom-get", {**place, "property": "guest-stats"})
            assert isinstance(said, dict)
            known = said["stats"]
            if said["last-update"] > asked and known["stat-available-memory"] > 0:
                return float(known["stat-total-memory"] - known["stat-available-memory"]) / _MIB
            await asyncio.sleep(0.5)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _publish(results: Results) -> None:
    tables = [_figures(results), _steps(results)]
    tables.append(
        report.Rows("The machine", ("what", "value"), (*results.machine.items(), *results.versions.items()))
    )
    builds, starts = (len(found.get(OURS, [])) for found in (results.builds, results.boots))
    said = (
        f"Measured on {results.date}: {builds} builds of each, and all else {starts} times. Medians, in "
        "parentheses the least and the most."
    )
    report.write(tables, said, _DOCUMENT, _MARK)


def _figures(results: Results) -> report.Rows:
    """What was measured beside what was to be reached."""
    rows: list[tuple[str, ...]] = []

    def compare(
        title: str, ours: Sequence[float], theirs: Sequence[float], unit: str, at_most: float
    ) -> None:
        measured = _spread(ours, unit)
        if not theirs:
            rows.append(
                (title, measured, f"not there: apt-get install {' '.join(results.missing)}", "", "", "")
            )
            return
        ratio = statistics.median(ours) / statistics.median(theirs)
        reached = ratio <= at_most
        rows.append(
            (
                title,
                measured,
                _spread(theirs, unit),
                f"{ratio:.2f}",
                f"at most {at_most}",
                report.met(reached),
            )
        )

    def both(found: dict[str, list[float]]) -> tuple[Sequence[float], Sequence[float]]:
        return found.get(OURS, []), found.get(THEIRS, [])

    sizes = {name: [size / _MIB for size in found] for name, found in results.sizes.items()}
    up = {name: [one.seconds for one in found] for name, found in results.boots.items()}
    used = {name: [one.used for one in found] for name, found in results.boots.items()}
    compare("build from nothing, to live-build's", *both(results.builds), "s", 1)
    compare("size of the ISO, to live-build's", *both(sizes), "MiB", 1)
    compare("power-on to the first screen, to live-build's", *both(up), "s", 1)
    compare("memory used after that, to live-build's", *both(used), "MiB", 1)
    authored, cards = results.authoring, results.cards
    compare("an ISO by pycdlib, to xorriso's", authored["pycdlib"], authored["xorriso"], "s", 1.2)
    compare("a card by write-card, to dd and cmp", cards["write-card"], cards["dd, cmp"], "s", 1)
    return report.Rows(
        "The figures to reach", ("figure", "ours", "the other's", "ratio", "wanted", "reached"), tuple(rows)
    )


def _steps(results: Results) -> report.Rows:
    titles = [title for title in results.steps[0] if title.count("/") <= 1]
    rows = tuple(
        (title.replace("/", ": "), report.spread([one[title] for one in results.steps if title in one]))
        for title in titles
    )
    counted = ((f"packages in {name}'s", str(number)) for name, number in results.packages.items())
    return report.Rows(f"Where {OURS}'s time goes", ("step", "seconds"), (*rows, *counted))


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{statistics.median(values):.1f} {unit} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kiosk", description=main.__doc__)
    parser.add_argument("--builds", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with progress.reporting():
        main(arguments.builds, arguments.runs)
