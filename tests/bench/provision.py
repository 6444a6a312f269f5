"""How fast a volume gets its system, beside copying the same bytes, `tar -x`, and virt-resize.

    python -m tests.bench.provision IMAGE [--runs N] [--virt-resize]

Each thing is measured as often as asked for, in turn, in one directory of the site's artifacts, to the end of
an fsync; the medians are printed, and put into docs/benchmarks.md. IMAGE is one of the site's with a version.

copy        provision's way `copy`, onto a disk of twice the size: signature and sums checked, blocks copied,
            file system grown, identity written
cp          `cp --sparse=auto` of a raw image with the same allocated bytes: the physical limit
unpack      provision's way `unpack`: the bundle, its sums checked, onto a new disk
tar         `mke2fs`, and a bare `tar -x` of the bundle onto it, mounted
virt-resize what libguestfs's tool makes of the same qcow2: the larger disk, without an identity
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tests.bench.report import Rows, write
from vdibuild import host
from vdibuild import site as sites
from vdibuild.manifest import Manifest
from vdibuild.provision import ways
from vdibuild.provision.identity import Identity
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.provision.ways import Placement, Way
from vdibuild.recipe import NetworkInterface
from vdibuild.store import BUNDLE, DISK, Store, Version

_DOCUMENT = Path(__file__).parents[2] / "docs/benchmarks.md"
_IDENTITY = Identity("bench.example.org", (), NetworkInterface("link", 0))


@dataclass(frozen=True)
class Bench:
    """What is measured. directory: where the disks are made."""

    store: Store
    version: Version
    described: Manifest
    directory: Path
    accelerator: Literal["kvm", "tcg"]

    @property
    def prepared(self) -> PreparedDisks:
        return PreparedDisks(self.directory / "disks", self.store)

    @property
    def volume(self) -> Path:
        """The disk that each makes anew."""
        return self.directory / "volume.raw"

    def new(self, size: int) -> Path:
        """An empty disk of `size` MiB."""
        self.volume.unlink(missing_ok=True)
        with self.volume.open("wb") as file:
            file.truncate(size << 20)
        return self.volume

    def ours(self, way: Way, size: int) -> None:
        """A way of provision's, from the check of the image to the fsync."""
        volume = self.new(size)
        self.store.trust(self.version, *way.files)
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            Placement(
                self.version.path,
                self.described,
                volume,
                size,
                _IDENTITY,
                Path(scratch),
                self.accelerator,
                self.prepared,
            ).put(way)

    def copy(self) -> None:
        """From the image, onto a disk of twice its size."""
        size = self.described.layout.size * 2
        self.ours(ways.choose(self.described.layout, size), size)

    def unpack(self) -> None:
        """From the bundle."""
        self.ours(Way("unpack", ways.unpacking(self.described.layout), ""), self.described.layout.size)

    def cp(self) -> None:
        """The allocated bytes, copied."""
        self.volume.unlink(missing_ok=True)
        run("cp", "--sparse=auto", str(self.directory / "source.raw"), str(self.volume))
        run("sync", str(self.volume))

    def tar(self) -> None:
        """The bundle's files on a new file system."""
        volume = self.new(self.described.layout.size)
        place = self.directory / "mounted"
        place.mkdir(exist_ok=True)
        run("mke2fs", "-q", "-F", "-t", "ext4", str(volume))
        run("mount", "-o", "loop", str(volume), str(place))
        try:
            bundle = str(self.version.path / BUNDLE)
            run(
                "tar",
                "-x",
                "--zstd",
                "--numeric-owner",
                "--xattrs",
                "--xattrs-include=*",
                "-f",
                bundle,
                "-C",
                str(place),
            )
        finally:
            run("umount", str(place))
        run("sync", str(volume))

    def virt_resize(self) -> None:
        """libguestfs's own tool."""
        volume = self.new(self.described.layout.size * 2)
        last = max(self.described.layout.partitions, key=lambda one: one.start).number
        settings = {"LIBGUESTFS_BACKEND": "direct"}
        if host.accelerator().name == "tcg":
            settings["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
        expand = ["virt-resize", "--quiet", "--expand", f"/dev/sda{last}"]
        argv = [*expand, str(self.version.path / DISK), str(volume)]
        subprocess.run(argv, check=True, env={**os.environ, **settings})
        run("sync", str(volume))


def run(*argv: str) -> None:
    """A peer's command, which has to succeed."""
    subprocess.run(argv, check=True)


def measure(image: str, runs: int, site_file: Path, *, virt_resize: bool) -> None:
    """Measure all of them in turn, print the table, and put it into the document."""
    site = sites.load(site_file)
    store = Store(site.artifacts_directory, site.keys)
    version = store.get(image)
    with tempfile.TemporaryDirectory(dir=site.artifacts_directory, prefix=".bench-") as directory:
        bench = Bench(store, version, version.manifest(), Path(directory))
        source = Path(directory) / "source.raw"
        run("qemu-img", "convert", "-O", "raw", str(version.path / DISK), str(source))
        allocated = source.stat().st_blocks >> 11
        stored = (version.path / BUNDLE).stat().st_size >> 20
        things: dict[str, Callable[[], None]] = {
            "copy": bench.copy,
            "cp": bench.cp,
            "unpack": bench.unpack,
            "tar": bench.tar,
        }
        if virt_resize:
            things["virt-resize"] = bench.virt_resize
        seconds: dict[str, list[float]] = {name: [] for name in things}
        for _ in range(runs):
            for name, thing in things.items():
                run("sync", "-f", directory)
                began = time.perf_counter()
                thing()
                seconds[name].append(time.perf_counter() - began)
                bench.volume.unlink()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    limits = {"copy": "cp", "unpack": "tar"}
    rows = []
    for name, values in seconds.items():
        limit = limits.get(name)
        ratio = f"{medians[name] / medians[limit]:.2f} times {limit}" if limit else ""
        rows.append((name, f"{medians[name]:.2f} s ({min(values):.2f}-{max(values):.2f})", ratio))
    table = Rows("From a stored image to a disk", ("", "median (least-most)", "to its limit"), tuple(rows))
    load = "/".join(f"{one:.1f}" for one in os.getloadavg()[:2])
    said = (
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {os.cpu_count()} processors, whose load "
        f"over 1 and 5 minutes was {load}; medians of {runs}; {allocated} MiB allocated, {stored} MiB bundle."
    )
    write([table], said, _DOCUMENT, "bench.provision")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--site", type=Path, default=Path(sites.DEFAULT_NAME))
    parser.add_argument("--virt-resize", action="store_true")
    arguments = parser.parse_args()
    measure(arguments.image, arguments.runs, arguments.site, virt_resize=arguments.virt_resize)


if __name__ == "__main__":
    main()
