"""A golden image by installation: where its time goes, and what the driver adds to the guest's own.

`./inv bench.install`, or `python -m tests.bench.install`. docs/benchmarks.md says what is measured and how;
the last table is written into it, and every single measurement to artifacts/bench/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from tests.bench import report
from tests.bench.golden import this_machine
from tests.guest import libvirtd
from vdibuild import golden, installation, progress
from vdibuild import site as sites
from vdibuild.errors import HostError, VdibuildError
from vdibuild.progress import Reporter, Step
from vdibuild.site import Site

_PROJECT = Path(__file__).parents[2]
_DOCUMENT = _PROJECT / "docs/benchmarks.md"
_MARK = "bench.install"
_IMAGE = "debian-13-lvm"
_WANTED = 0.05
_FIRST, _LAST = "virt-install", "unmount"
"""The driver's first step, and the last stage that our installer tells of."""
_LOGS = Path("/var/log/libvirt/qemu")
_STAMP = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+0000): "


@dataclass
class Run:
    """One build. seconds: from the command to the version. steps: by name, nested ones joined by a slash.

    guest: from QEMU's start to its end, by libvirt's own log. driver: from virt-install's start until the
    driver has the disk. processor: seconds of a processor that driver and watcher used in between.
    """

    seconds: float
    steps: dict[str, float]
    guest: float
    driver: float
    processor: float

    @property
    def overhead(self) -> float:
        """What the driver adds, as a share of the guest's own time."""
        return (self.driver - self.guest) / self.guest


@dataclass
class Results:
    """All that was measured, as it is written to artifacts/bench. Times in seconds.

    prepared: installer and bundle, by name: what is built once, and used by every installation.
    """

    date: str
    machine: dict[str, str]
    image: str
    prepared: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)


class _Clock(Reporter):
    """Shows steps as usual, and takes the driver's time: from virt-install to the end of the last stage."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True))
        self.driver = self.processor = 0.0
        self._began: tuple[float, float] | None = None

    def started(self, step: Step) -> None:
        """See Reporter."""
        super().started(step)
        if step.name == _FIRST:
            self._began = time.monotonic(), time.process_time()

    def ended(self, step: Step, failed: bool) -> None:
        """See Reporter."""
        super().ended(step, failed)
        if self._began and step.name == _LAST:
            began, used = self._began
            self.driver, self.processor = time.monotonic() - began, time.process_time() - used


def main(runs: int = 3, image: str = _IMAGE, site_file: Path = _PROJECT / sites.DEFAULT_NAME) -> None:
    """Measure, print the tables, and write them to docs/benchmarks.md and the runs to artifacts/bench.

    runs: how often the installation is measured. image: one of the site that our own installer installs.
    """
    if os.geteuid() != 0:
        raise HostError("a libvirt of the benchmark's own needs root", "run this as root")
    given = sites.load(site_file)
    results = Results(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", this_machine(), image)
    bench = given.artifacts_directory / "bench"
    bench.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=given.artifacts_directory) as work,
        progress.logging_to(bench / "install.log"),
    ):
        own = _site(given, Path(work))
        with _libvirt(own, Path(work)) as used:
            _prepare(used, image, results)
            for number in range(1, runs + 1):
                with progress.step(f"run {number} of {runs}"):
                    results.runs.append(_run(used, image))
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    (bench / f"install-{stamp}.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    _publish(results)


def _site(given: Site, work: Path) -> Site:
    """The given site with artifacts and a cache of its own."""
    libvirtd.let_in(work)
    return given.model_copy(update={"artifacts": work / "artifacts", "cache": work / "cache"})


@contextlib.contextmanager
def _libvirt(site: Site, work: Path) -> Iterator[Site]:
    """The site with a libvirt that nobody else uses."""
    directory = work / "libvirt"
    directory.mkdir()
    with libvirtd.system(directory) as running:
        yield site.model_copy(update={"libvirt": running.uri})


def _prepare(site: Site, name: str, results: Results) -> None:
    image = site.image(name)[1]
    if image.method != "install" or not image.bundle:
        raise VdibuildError(f"{name} is not installed from a bundle", f"take one that is, such as {_IMAGE}")
    began = time.monotonic()
    installation.prepare(site, image)
    results.prepared["installer"] = time.monotonic() - began
    began = time.monotonic()
    golden.build(site, image.bundle)
    results.prepared[image.bundle] = time.monotonic() - began


def _run(site: Site, name: str) -> Run:
    log = _LOGS / f"{name}.log"
    log.unlink(missing_ok=True)
    clock = _Clock()
    began = time.monotonic()
    with progress.reporting(clock):
        built = golden.build(site, name, fresh=True)
    seconds = time.monotonic() - began
    return Run(seconds, built.version.described().timings, _lifetime(log), clock.driver, clock.processor)


def _lifetime(log: Path) -> float:
    """Seconds from a guest's start to its end, by libvirt's log of it."""
    text = log.read_text(errors="replace")
    stamps = [
        datetime.fromisoformat(found[1])
        for pattern in (f"{_STAMP}starting up", f"{_STAMP}shutting down")
        if (found := re.search(pattern, text, re.MULTILINE))
    ]
    if len(stamps) != 2:
        raise VdibuildError(f"{log} does not tell when the guest started and ended")
    return (stamps[1] - stamps[0]).total_seconds()


def _publish(results: Results) -> None:
    runs = results.runs
    overhead = statistics.median(run.overhead for run in runs)
    titles = [title for title in runs[0].steps if title.count("/") <= 1]
    prepared = tuple((f"{name}, once", f"{took:.1f} s") for name, took in results.prepared.items())
    phases = tuple(
        (title.replace("/", ": "), report.spread([run.steps.get(title, 0.0) for run in runs]))
        for title in titles
    )
    figures = (
        ("from the command to the verified version", report.spread([run.seconds for run in runs]), "", ""),
        ("the guest, by libvirt's log", report.spread([run.guest for run in runs]), "", ""),
        ("the driver, from virt-install's start", report.spread([run.driver for run in runs]), "", ""),
        ("what it adds to the guest's time", f"{overhead:.1%}", "under 5%", report.met(overhead < _WANTED)),
        ("processor time of driver and watcher", report.spread([run.processor for run in runs]), "", ""),
    )
    said = (
        f"`{results.image}`, {results.date}; medians of {len(runs)}, in parentheses the least and the most."
    )
    tables = (
        report.Rows("An installation", ("figure", "measured", "wanted", "reached"), figures),
        report.Rows("Where an installation's time goes", ("step", "seconds"), (*prepared, *phases)),
        report.Rows("The machine", ("what", "value"), tuple(results.machine.items())),
    )
    report.write(tables, said, _DOCUMENT, _MARK)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.install", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--image", default=_IMAGE)
    arguments = parser.parse_args()
    with progress.reporting():
        main(arguments.runs, arguments.image)
