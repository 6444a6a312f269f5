"""How fast a volume gets its system, and how small an image becomes, beside others and the physical limit.

    python -m tests.bench.provision IMAGE [--runs N] [--appliance-runs N]

Each thing is measured as often as asked for, in turn, in one directory of the site's artifacts, to the end of
an fsync; the medians are printed, and put into docs/benchmarks.md. IMAGE is one of the site's with a version,
with ext4 on a partition. docs/benchmarks.md says what is measured, and why so. It needs root.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from tests.bench.report import Rows, circumstances, met, write
from vdibuild import host
from vdibuild import site as sites
from vdibuild.disk import shrink
from vdibuild.disk.layout import Partition
from vdibuild.manifest import Manifest
from vdibuild.provision import ways
from vdibuild.provision.identity import Identity
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.provision.sources import Stored
from vdibuild.provision.ways import Placement, Way
from vdibuild.recipe import NetworkInterface
from vdibuild.store import BUNDLE, DISK, Store, Version

_HERE = Path(__file__).parent
_DOCUMENT = _HERE.parents[1] / "docs/benchmarks.md"
_IDENTITY = Identity("bench.example.org", (), NetworkInterface("link", 0), "52:54:00:00:00:01")
_MIB = 1 << 20
_HEADROOM = 64
_DELETED = 400
"""MiB of files that were written to the disk which is shrunk, and deleted."""
_TAR = ("tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*")


@dataclass
class Bench:
    """What is measured. directory: where the disks are made. sizes: of the results, in bytes, by name."""

    store: Store
    version: Version
    described: Manifest
    directory: Path
    accelerator: Literal["kvm", "tcg"]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def volume(self) -> Path:
        """The disk that each makes anew."""
        return self.directory / "volume"

    @property
    def source(self) -> Path:
        """The image's disk, raw."""
        return self.directory / "source.raw"

    @property
    def used(self) -> Path:
        """A disk on which files were deleted, raw: what is shrunk."""
        return self.directory / "used.raw"

    @property
    def mounted(self) -> Path:
        """An empty directory to mount on."""
        return self.directory / "mounted"

    @property
    def prepared(self) -> PreparedDisks:
        """Where provision keeps disks without their compression."""
        return PreparedDisks(self.directory / "disks", self.store)

    @property
    def bundle(self) -> Path:
        """The image's bundle."""
        return self.version.path / BUNDLE

    def prepare(self) -> None:
        """Make what all of them need."""
        self.mounted.mkdir()
        run("qemu-img", "convert", "-O", "raw", str(self.version.path / DISK), str(self.source))
        self.copy()
        self.volume.rename(self.used)
        root, _ = self.described.layout.mounts[0]
        if not isinstance(root, Partition):
            raise SystemExit(f"{self.version.image} has its root on LVM: name an image with a partition")
        run("mount", "-o", f"loop,offset={root.start * _MIB}", str(self.used), str(self.mounted))
        try:
            with (self.mounted / "deleted").open("wb") as file:
                for _ in range(_DELETED):
                    file.write(os.urandom(_MIB))
                os.fsync(file.fileno())
            (self.mounted / "deleted").unlink()
        finally:
            run("umount", str(self.mounted))

    def new(self, size: int) -> Path:
        """An empty disk of `size` MiB."""
        self.volume.unlink(missing_ok=True)
        with self.volume.open("wb") as file:
            file.truncate(size * _MIB)
        return self.volume

    # Ours

    def put(self, way: Way) -> None:
        """A way of provision's, from the check of the image to the fsync."""
        volume = self.new(way.layout.size)
        source = Stored(self.store, self.version)
        source.trust(archive=way.name == "unpack")
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            Placement(
                source,
                way,
                volume,
                way.layout.size,
                _IDENTITY,
                Path(scratch),
                self.directory,
                self.accelerator,
                self.prepared,
            ).put()

    def first_copy(self) -> None:
        """From the image, of which no machine was made before."""
        shutil.rmtree(self.prepared.directory)
        self.copy()

    def copy(self) -> None:
        """From the image, onto a disk of twice its size."""
        source = Stored(self.store, self.version)
        self.put(ways.choose(source, self.described.layout.size * 2, None))

    def unpack(self) -> None:
        """From the bundle, onto a new disk of the image's size."""
        layout = self.described.layout
        self.put(Way("unpack", ways.unpacking(layout), "", layout))

    def shrink(self) -> None:
        """The used disk, as small as it gets; not booted, as the others do not either."""
        shrink.shrink(
            self.used, self.volume, headroom=_HEADROOM, accelerator=self.accelerator, boot_seconds=None
        )

    # The limits

    def cp(self) -> None:
        """The allocated bytes, copied."""
        run("cp", "--sparse=auto", str(self.source), str(self.volume))

    def tar(self) -> None:
        """The bundle's files on a new file system."""
        volume = self.new(self.described.layout.size)
        run("mke2fs", "-q", "-F", "-t", "ext4", str(volume))
        run("mount", "-o", "loop", str(volume), str(self.mounted))
        try:
            run(*_TAR, "--zstd", "-f", str(self.bundle), "-C", str(self.mounted))
        finally:
            run("umount", str(self.mounted))

    # Others

    def seed(self) -> None:
        """What a script does on a hypervisor."""
        volume = self.new(self.described.layout.size)
        run("sh", str(_HERE / "seed.sh"), str(self.bundle), str(volume), str(self.mounted))

    def guestfish(self) -> None:
        """The bundle's files through libguestfs's shell; no boot loader, no identity."""
        volume = self.new(self.described.layout.size)
        script = ["run", ":", "part-disk", "/dev/sda", "mbr", ":", "mkfs", "ext4", "/dev/sda1", ":"]
        script += ["mount", "/dev/sda1", "/", ":", "tar-in", "-", "/", "xattrs:true"]
        argv = ["guestfish", "--format=raw", "-a", str(volume), *script]
        with subprocess.Popen(["zstd", "-qdc", str(self.bundle)], stdout=subprocess.PIPE) as zstd:
            subprocess.run(argv, check=True, stdin=zstd.stdout, env=self._appliance())

    def virt_resize(self) -> None:
        """libguestfs's tool for a larger disk, without an identity."""
        volume = self.new(self.described.layout.size * 2)
        last = max(self.described.layout.partitions, key=lambda one: one.start).number
        argv = ["virt-resize", "--quiet", "--expand", f"/dev/sda{last}", str(self.version.path / DISK)]
        subprocess.run([*argv, str(volume)], check=True, env=self._appliance())

    def virt_sparsify(self, *options: str) -> None:
        """libguestfs's tool for a disk that takes less room."""
        argv = ["virt-sparsify", "--quiet", "--format", "raw", "--convert", "qcow2", *options]
        argv += ["--tmp", str(self.directory), str(self.used), str(self.volume)]
        subprocess.run(argv, check=True, env=self._appliance())

    def _appliance(self) -> dict[str, str]:
        settings = {"LIBGUESTFS_BACKEND": "direct"}
        if self.accelerator == "tcg":
            settings["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
        return {**os.environ, **settings}


def run(*argv: str) -> None:
    """A command that has to succeed."""
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)


def measure(image: str, runs: int, appliance_runs: int, site_file: Path) -> None:
    """Measure all of them in turn, print the tables, and put them into the document."""
    site = sites.load(site_file)
    store = Store(site.artifacts_directory, site.keys)
    version = store.get(image)
    accelerator = host.accelerator().name
    with tempfile.TemporaryDirectory(dir=site.artifacts_directory, prefix=".bench-") as directory:
        bench = Bench(store, version, version.manifest(), Path(directory), accelerator)
        bench.prepare()
        things: dict[str, Callable[[], None]] = {
            "vdibuild, copy": bench.copy,
            "vdibuild, copy for the first time": bench.first_copy,
            "cp --sparse": bench.cp,
            "vdibuild, unpack": bench.unpack,
            "mke2fs, tar -x": bench.tar,
            "script": bench.seed,
            "vdibuild, shrink": bench.shrink,
        }
        slow: dict[str, Callable[[], None]] = {
            "guestfish tar-in": bench.guestfish,
            "virt-resize": bench.virt_resize,
            "virt-sparsify": bench.virt_sparsify,
            "virt-sparsify --compress": partial(bench.virt_sparsify, "--compress"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*things, *slow)}
        for number in range(max(runs, appliance_runs)):
            now = list(
                ((things if number < runs else {}) | (slow if number < appliance_runs else {})).items()
            )
            # Each comes after another one in each round: what that left to the host's disk is nobody's.
            random.Random(number).shuffle(now)  # noqa: S311 (no secret)
            for name, thing in now:
                run("sync", "-f", directory)
                began = time.perf_counter()
                thing()
                run("sync", str(bench.volume))
                seconds[name].append(time.perf_counter() - began)
                # A run that is ended too early has said this much.
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
                bench.sizes[name] = bench.volume.stat().st_blocks * 512
                bench.volume.unlink()
        allocated = bench.source.stat().st_blocks * 512
        stored = bench.bundle.stat().st_size
    said = (
        f"{circumstances()}; guests run by {accelerator.upper()}. Medians of "
        f"{runs}, those in the appliance of {appliance_runs}; in parentheses the least and the most. The "
        f"image: {allocated // _MIB} MiB allocated, its bundle {stored // _MIB} MiB."
    )
    write(tables(seconds, bench.sizes), said, _DOCUMENT, "bench.provision")


def tables(seconds: dict[str, list[float]], sizes: dict[str, int]) -> list[Rows]:
    """What was measured, and what of it was to be reached. sizes: of the results, in bytes."""
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    measured = tuple(
        (name, _spread(seconds[name]), f"{sizes[name] / _MIB:.0f} MiB") for name in seconds if name in medians
    )
    copy, unpack = medians["vdibuild, copy"], medians["vdibuild, unpack"]
    copied = copy / medians["cp --sparse"]
    unpacked = unpack / medians["mke2fs, tar -x"]
    by_script = unpack / medians["script"]
    rows = [
        ("copy to the copy of the allocated bytes", f"{copied:.2f}", "at most 1.3", met(copied <= 1.3)),
        ("unpack to a bare tar -x", f"{unpacked:.2f}", "at most 1.3", met(unpacked <= 1.3)),
        ("unpack to the script", f"{by_script:.2f}", "under 1", met(by_script < 1)),
    ]
    if "virt-sparsify" in medians:
        faster = medians["vdibuild, shrink"] / medians["virt-sparsify"]
        smaller = sizes["vdibuild, shrink"] / sizes["virt-sparsify --compress"]
        rows += [
            ("shrink to virt-sparsify, time", f"{faster:.2f}", "under 1", met(faster < 1)),
            ("shrink to virt-sparsify --compress, size", f"{smaller:.2f}", "under 1", met(smaller < 1)),
        ]
    return [
        Rows("From a stored image to a disk, and to a small one", ("", "seconds", "takes"), measured),
        Rows("What was to be reached", ("ratio", "measured", "wanted", "reached"), tuple(rows)),
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--appliance-runs", type=int, default=1)
    parser.add_argument("--site", type=Path, default=Path(sites.DEFAULT_NAME))
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("this has to be run by root: it mounts file systems")
    measure(arguments.image, arguments.runs, arguments.appliance_runs, arguments.site)


if __name__ == "__main__":
    main()
