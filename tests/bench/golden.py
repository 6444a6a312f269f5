"""The golden pipeline beside mkosi, vmdb2 and debos: one run, one machine, one mirror, ratios and medians.

`./inv bench.golden`, or `python -m tests.bench.golden`. docs/benchmarks.md says what is measured and how; the
last table is written into it, and every single measurement to artifacts/bench/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import yaml

from tests.bench import mirror, peers, report
from tests.bench.mirror import Mirror
from tests.bench.results import EQUAL, OURS, Cold, Results
from vdibuild import (
    __version__,
    bootstrap,
    families,
    golden,
    host,
    machine,
    process,
    progress,
    resources,
    tree,
)
from vdibuild import site as sites
from vdibuild.disk import write
from vdibuild.errors import HostError, VdibuildError, VerificationError
from vdibuild.machine import Hardware
from vdibuild.manifest import Manifest
from vdibuild.site import Site
from vdibuild.store import BUNDLE, DISK, Store, Version
from vdibuild.tree import Tree

Result = TypeVar("Result")

_PROJECT = Path(__file__).parents[2]
_DOCUMENT = _PROJECT / "docs/benchmarks.md"
_PROGRAM = (sys.executable, "-c", "from vdibuild.console import program; program.run()")

_TOOLS = ("mmdebstrap", "debootstrap", "e2fsprogs", "qemu-utils", "qemu-system-x86", "zstd")
_ATTEMPTS = 3
_BOOT_SECONDS = 300.0
_MIB = 1 << 20


def main(runs: int = 3, image: str | None = None, site_file: Path = _PROJECT / sites.DEFAULT_NAME) -> None:
    """Measure, print the tables, and write them to docs/benchmarks.md and the runs to artifacts/bench.

    runs: how often everything is measured. image: a Debian image of the site with one ext4 file system that
    boots from BIOS; by default the site's first.
    """
    if os.geteuid() != 0:
        raise HostError(
            "the other builders need root", "run this as root, on a machine that nobody else uses"
        )
    # Ours makes the same bytes twice only for one time; the last midnight serves as well as any.
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time()) // 86400 * 86400))
    given = sites.load(site_file)
    name, settings = given.image(image)
    results = Results(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        machine=this_machine(),
        versions=_versions(),
        missing={one.name: " ".join(one.missing()) for one in peers.PEERS if one.missing()},
    )
    bench = given.artifacts_directory / "bench"
    bench.mkdir(parents=True, exist_ok=True)
    archives = {role: url for role, url in families.get(settings.family).mirrors(settings).items() if url}
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=given.artifacts_directory) as work,
        mirror.serving(archives, bench / "mirror") as served,
        progress.logging_to(bench / "golden.log"),
    ):
        _Bench(given, name, served, Path(work), results).run(runs)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    (bench / f"golden-{stamp}.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    report.publish(results, _DOCUMENT)


class _Directory:
    """A site of the benchmark's own: the given site's image, from the counting mirror, with nothing cached.

    packages: what to install in addition.
    """

    def __init__(self, path: Path, given: Site, name: str, served: Mirror) -> None:
        self.packages: list[str] = []
        self._path = path
        self._given = given
        self._name = name
        self._served = served

    def load(self) -> Site:
        """The site; written anew, so that it is as it was given."""
        text = yaml.safe_load(self._given.source.read_text(encoding="utf-8"))
        image = dict(text["images"][self._name])
        for key in ("keyring", "playbook"):
            if key in image:
                image[key] = str(self._given.directory / image[key])
        image["mirror"] = self._served.urls["main"]
        if "security" in self._served.urls:
            image["security_mirror"] = self._served.urls["security"]
        image["overlays"] = [*image.get("overlays", []), "bench"]
        image["packages"] = [*image.get("packages", []), *self.packages]
        self._path.mkdir(exist_ok=True)
        file = self._path / sites.DEFAULT_NAME
        file.write_text(yaml.safe_dump({"images": {self._name: image}, "keys": {"signing": "signing_key"}}))
        return sites.load(file)

    def make(self) -> None:
        """Write the site, with the given one's own files and an overlay to change."""
        self.load()
        for kind in resources.KINDS:
            (self._path / kind).mkdir()
            if (self._given.directory / kind).is_dir():
                for entry in (self._given.directory / kind).iterdir():
                    (self._path / kind / entry.name).symlink_to(entry)
        self.change_overlay()

    def change_overlay(self) -> None:
        """Give the overlay's one file another content."""
        file = self._path / "overlays/bench/etc/bench"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{time.time_ns()}\n")

    def build(self, *options: str) -> float:
        """Run the command as a user does; returns its seconds."""
        argv = [*_PROGRAM, "build-golden", "--image", self._name, *options]
        env = {"PYTHONPATH": str(_PROJECT)}
        return _timed(lambda: process.run(argv, cwd=self._path, env=env))

    def newest(self) -> Version:
        """What the last build made."""
        site = self.load()
        return Store(site.artifacts_directory, site.keys).get(self._name)

    def remove(self) -> None:
        """Remove all of it."""
        tree.remove(self._path)


class _Bench:
    """One run of the benchmark."""

    def __init__(self, given: Site, name: str, served: Mirror, work: Path, results: Results) -> None:
        self._given = given
        self._name = name
        self._served = served
        self._work = work
        self._results = results
        self._site = _Directory(work / "ours", given, name, served)
        self._equal = _Directory(work / "equal", given, name, served)
        self._task = _task(name, self._site.load())
        self._peers = [one for one in peers.PEERS if one.name not in results.missing]

    def run(self, runs: int) -> None:
        for number in range(runs):
            last = number == runs - 1
            with progress.step(f"round {number + 1} of {runs}"):
                self._round(first=number == 0, last=last)

    def _round(self, *, first: bool, last: bool) -> None:
        with self._building(self._site, OURS):
            self._smaller_figures(last=last)
        for peer in self._peers:
            self._peer(peer, look=first)
        if first:
            self._compare_packages()
        if self._equal.packages:
            with self._building(self._equal, EQUAL):
                pass

    # Ours

    @contextmanager
    def _building(self, directory: _Directory, builder: str) -> Iterator[None]:
        """A cold build of ours; its site is there for the block, and gone afterwards."""

        def build() -> tuple[float, Manifest, int]:
            directory.make()
            seconds = directory.build()
            version = directory.newest()
            return seconds, version.manifest(), (version.path / DISK).stat().st_size

        try:
            with progress.step(builder):
                seconds, manifest, size = self._settled(build, directory.remove)
            self._results.cold.append(
                Cold(
                    builder,
                    seconds=_unverified(seconds, manifest),
                    size=size,
                    downloaded=self._served.traffic.packages,
                    whole_seconds=seconds,
                    steps=manifest.timings,
                )
            )
            self._results.boots.setdefault(builder, "login, agent, no failed unit; two copies differ")
            self._results.packages.setdefault(builder, sorted(one.name for one in manifest.packages))
            yield
        finally:
            directory.remove()

    def _smaller_figures(self, *, last: bool) -> None:
        """What is measured on a site that has built its image."""
        with progress.step("nothing changed"):
            self._results.unchanged.append(self._site.build())
        with progress.step("one overlay file changed"):
            self._site.change_overlay()
            seconds = self._site.build()
        self._results.whole_overlay.append(seconds)
        self._results.overlay.append(_unverified(seconds, self._site.newest().manifest()))
        self._disks()
        if last:
            self._second_build()

    def _disks(self) -> None:
        """From the finished tree to the compressed disk, by our code and by the bare tools."""
        planned = golden.plan(self._site.load(), self._name)
        laid_out = planned.layout
        assert laid_out, "it is bootstrapped"
        system = Tree(self._site.load().cache_directory / "steps" / planned.system.key / "tree")
        family = families.get(planned.image.family)
        boot = family.boot_files(system)
        accelerator = host.accelerator(system.path(family.kernels(system)[0].image)).name
        raw, compressed = self._work / "disk.raw", self._work / "disk.qcow2"

        def ours() -> None:
            write.write(system, laid_out, boot, raw, accelerator)
            write.compress(raw, compressed)

        def bare() -> None:
            with raw.open("wb") as file:
                file.truncate(laid_out.size * _MIB)
            process.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(system.root), str(raw)])
            convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", "4", "-W"]
            process.run([*convert, "-o", "compression_type=zstd", str(raw), str(compressed)])

        for title, work, times in (
            ("disk from the finished tree", ours, self._results.disk),
            ("the same by mke2fs and qemu-img", bare, self._results.bare_disk),
        ):
            with progress.step(title):
                times.append(_timed(work))
            raw.unlink()
            compressed.unlink()
        with progress.step("unpack the bundle"):
            self._results.unpack.append(self._unpack())
        files = list(system.root.rglob("*"))
        self._results.tree_files = len(files)
        self._results.tree_bytes = sum(
            path.lstat().st_size for path in files if path.is_file() and not path.is_symlink()
        )

    def _unpack(self) -> float:
        """Seconds that tar and zstd alone need to make the system's files: no build can be quicker."""
        bundle = self._site.newest().path / BUNDLE
        target = self._work / "unpacked"
        target.mkdir()
        argv = ["tar", "--extract", "--zstd", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
        try:
            return _timed(
                lambda: process.run(
                    [*argv, "--preserve-permissions", f"--directory={target}", f"--file={bundle}"]
                )
            )
        finally:
            tree.remove(target)

    def _second_build(self) -> None:
        """Build everything again: what is downloaded, and which bytes are not the same."""
        before = self._site.newest()
        self._served.traffic.reset()
        with progress.step("everything again"):
            self._site.build("--fresh")
        self._results.second_packages = self._served.traffic.packages
        self._results.second_indices = self._served.traffic.indices
        after = self._site.newest()
        self._results.same_bundle = _same(before.path / BUNDLE, after.path / BUNDLE)
        self._results.same_disk = _same(before.path / DISK, after.path / DISK)
        if not self._results.same_disk:
            self._results.differing = self._differing(before.path / DISK, after.path / DISK)

    def _differing(self, before: Path, after: Path) -> str:
        """How much of two disks differs, as the guest sees them."""
        disks = []
        for number, disk in enumerate((before, after)):
            raw = self._work / f"compare-{number}.raw"
            process.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)])
            disks.append(raw)
        blocks = 0
        with disks[0].open("rb") as one, disks[1].open("rb") as other:
            while data := one.read(4096):
                blocks += data != other.read(4096)
        for raw in disks:
            raw.unlink()
        return f"{blocks} blocks of 4 KiB" if blocks else "only how qemu-img orders its clusters"

    # The others

    def _peer(self, peer: peers.Peer, *, look: bool) -> None:
        directory = self._work / peer.name
        disk = self._work / f"{peer.name}.qcow2"

        def build() -> float:
            with peers.working(directory) as work:
                return _timed(lambda: write.compress(peer.build(self._task, work), disk))

        try:
            with progress.step(peer.name):
                seconds = self._settled(build, lambda: disk.unlink(missing_ok=True))
            if look:
                with progress.step(f"boot {peer.name}'s"):
                    self._look(peer.name, disk)
            self._results.cold.append(
                Cold(
                    peer.name,
                    seconds=seconds,
                    size=disk.stat().st_size,
                    downloaded=self._served.traffic.packages,
                )
            )
        finally:
            disk.unlink(missing_ok=True)

    def _look(self, name: str, disk: Path) -> None:
        """Boot a peer's image, and note what is seen."""
        settings = self._site.load().image(self._name)[1]
        hardware = Hardware(settings.firmware, settings.memory, host.accelerator().name)
        seen, packages = asyncio.run(_boot(disk, hardware, self._work))
        self._results.boots[name] = seen
        self._results.packages[name] = packages

    def _compare_packages(self) -> None:
        """What all peers install and we do not is installed too, in builds of its own."""
        found = self._results.packages
        theirs = [set(found[one.name]) for one in self._peers if found.get(one.name)]
        if theirs:
            self._equal.packages = sorted(set.intersection(*theirs) - set(found[OURS]))

    def _settled(self, build: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """A build during which the mirror had everything; one that had to wait for more is repeated."""
        for _ in range(_ATTEMPTS):
            os.sync()
            self._served.traffic.reset()
            result = build()
            if not self._served.traffic.fetched:
                return result
            progress.note("again: the mirror had to fetch something")
            undo()
        raise HostError("the mirror's content changes all the time", "try again later")


async def _boot(disk: Path, hardware: Hardware, work: Path) -> tuple[str, list[str]]:
    """Boot an image; returns what was seen and, when its agent answers, the installed packages."""
    async with machine.started(disk, "qcow2", hardware, work, "peer") as guest:
        seen = []
        try:
            async with asyncio.timeout(_BOOT_SECONDS):
                await guest.console.shows(re.compile(r"^\S+ login: ?$", re.MULTILINE))
                seen.append("login")
                await guest.answering()
                seen.append("agent")
                state = (await guest.agent.run(["systemctl", "is-system-running", "--wait"])).stdout.strip()
                seen.append("no failed unit" if state == "running" else state)
                listed = await guest.agent.run(["dpkg-query", "--show", "--showformat=${Package}\\n"])
        except (TimeoutError, VerificationError) as error:
            seen.append(f"then {error}" if str(error) else f"no more in {_BOOT_SECONDS:.0f} s")
            return ", ".join(seen), []
        return ", ".join(seen), sorted(set(listed.stdout.split()))


def _task(name: str, site: Site) -> peers.Task:
    """The image as a task for the other builders."""
    image = site.image(name)[1]
    recipe = bootstrap.read_recipe(site, name, image)
    kinds = [volume.filesystem for volume in recipe.storage.partitions if volume.filesystem != "biosboot"]
    if image.family != "debian" or image.firmware != "bios" or kinds != ["ext4"] or not recipe.url:
        raise VdibuildError(
            f"{name} is nothing the other builders are set up for here",
            "take a Debian image that boots from BIOS and has one ext4 file system",
        )
    excluded, kept = peers.left_out(recipe.packages)
    return peers.Task(
        release=image.release,
        mirror=recipe.url.url,
        sources=(
            peers.Source(recipe.url.url, image.release),
            *(peers.Source(one.url, one.name) for one in recipe.repositories),
        ),
        packages=(*recipe.packages.names, *image.packages),
        size=image.disk.size,
        hostname=recipe.hostname,
        append=recipe.bootloader.append,
        services=recipe.services_enabled,
        excluded_paths=excluded,
        kept_paths=kept,
    )


def _unverified(seconds: float, manifest: Manifest) -> float:
    """A build's seconds without its verification; the steps must not overlap for that."""
    if sum(took for title, took in manifest.timings.items() if "/" not in title) > seconds:
        raise VdibuildError("the pipeline's steps overlap: verification cannot be subtracted")
    return seconds - manifest.timings["verification"]


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _same(one: Path, other: Path) -> bool:
    return process.run(["cmp", "--silent", str(one), str(other)], check=False).status == 0


def this_machine() -> dict[str, str]:
    """What this benchmark runs on, for its table."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerator = host.accelerator()
    return {
        "processor": f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "guests run": "under KVM" if accelerator.name == "kvm" else "emulated (TCG), without KVM",
    }


def _versions() -> dict[str, str]:
    result = {OURS: __version__, "Python": platform.python_version()}
    result |= {one.name: one.version() for one in peers.PEERS if not one.missing()}
    result |= {name: version for name in _TOOLS if (version := peers.package_version(name))}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.golden", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--image")
    arguments = parser.parse_args()
    with progress.reporting():
        main(arguments.runs, arguments.image)
