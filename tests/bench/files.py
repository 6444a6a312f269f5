"""How long a system of a million tiny files takes: to bundle, to check, and to get onto a disk.

    python -m tests.bench.files [--files N] [--runs N]

Each thing is measured in a process of its own, to the end of an fsync, beside tar and mke2fs that do only
that; the tables are printed, and put into docs/benchmarks.md. It needs root, which mounts file systems.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.bench.report import Rows, circumstances, spread, write
from vdibuild import archive, bundle, process
from vdibuild import site as sites
from vdibuild.disk import ext4, mkfs, mounted, native
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.output import sync
from vdibuild.provision import ways
from vdibuild.provision.anew import Disk
from vdibuild.tree import Tree, remove

_DOCUMENT = Path(__file__).parents[2] / "docs/benchmarks.md"
_MIB = 1 << 20
_IN_A_DIRECTORY = 1000
_BYTES_FOR_EACH = 16 << 10  # of the disk: as many as mke2fs sets aside for each inode
_MKE2FS = ("mke2fs", "-q", "-F", "-t", "ext4", "-i", str(_BYTES_FOR_EACH))
_INODES_OF_ITS_OWN = 11
"""Of an ext4: those that are reserved, its root among them, and lost+found."""

# What each of ours is compared with.
_PEERS = {
    "vdibuild, bundle": "tar, zstd",
    "vdibuild, check": "zstd, tar --list",
    "vdibuild, unpack on a mount": "mke2fs, mount, tar -x",
    "vdibuild, unpack without a mount": "tar -x, mke2fs -d",
}


@dataclass(frozen=True)
class Run:
    """One measurement. memory: MiB of the largest of its processes."""

    seconds: float
    memory: float


@dataclass
class Bench:
    """What is measured, in a directory of its own. files: how many there are."""

    directory: Path
    files: int
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def tree(self) -> Path:
        """The files."""
        return self.directory / "tree"

    @property
    def bundle(self) -> Path:
        """Their bundle."""
        return self.directory / "bundle.tar.zst"

    @property
    def written(self) -> Path:
        """What a measurement writes: an archive or a disk."""
        return self.directory / "written"

    @property
    def unpacked(self) -> Path:
        """An empty directory, to mount on or to unpack into."""
        return self.directory / "unpacked"

    @cached_property
    def layout(self) -> Layout:
        """A disk with an inode for each file, and room for directories and journal."""
        return Disk("ext4", 0).plan("bios", (self.files * 5 // 4 * _BYTES_FOR_EACH) // _MIB + 1024)

    @property
    def root(self) -> Partition:
        """Where the files get to."""
        place, _ = self.layout.mounts[0]
        if not isinstance(place, Partition):
            raise TypeError("the layout has its root on LVM")
        return place

    def prepare(self) -> None:
        """Make the files, a line of text in each, and their bundle."""
        for number in range(0, self.files, _IN_A_DIRECTORY):
            directory = self.tree / f"{number // _IN_A_DIRECTORY:04}"
            directory.mkdir(parents=True)
            for one in range(number, min(self.files, number + _IN_A_DIRECTORY)):
                (directory / f"file-{one}").write_text(f"this is number {one}\n")
        bundle.create(Tree(self.tree), self.bundle, None)

    # Ours

    def make_bundle(self) -> None:
        """As `bundle` and a golden build do."""
        bundle.create(Tree(self.tree), self.written, None)

    def check(self) -> None:
        """As for an archive that nobody vouched for."""
        bundle.check(self.bundle, limit=1 << 40)

    def unpack_mounted(self) -> None:
        """As provision does where root may mount."""
        disk = self._disk()
        native.write_table(self.layout, disk, sync=False)
        offset, size = ways.place_of(self.root)
        if not isinstance(self.root.holds, FileSystem):
            raise TypeError("the layout has no file system on /")
        process.run(mkfs.ext4(self.root.holds, disk, offset=offset, size=self.root.size))
        places = [(offset, size, "/")]
        bundle.unpack(
            self.bundle, self.unpacked, lambda tar: mounted.command(self.unpacked, disk, places, tar)
        )

    def unpack_native(self) -> None:
        """As provision does elsewhere."""
        disk = self._disk()
        native.write_table(self.layout, disk, sync=False)
        bundle.unpack(self.bundle, self.unpacked)
        native.write_partition(Tree(self.unpacked), self.layout, self.root, disk, self.directory)

    # Others

    def tar(self) -> None:
        """GNU tar with the same options for its format and order."""
        argv = ["tar", "-c", "-C", str(self.tree), "--sort=name", *archive.PACK, "."]
        with self.written.open("wb") as file:
            _pipe(argv, ["zstd", "-q", "-6", "--long=27"], file.fileno())

    def names(self) -> None:
        """What has to be read of it at least."""
        _pipe(self._decompressed, ["tar", "--list"])

    def mount(self) -> None:
        """By hand, on a disk without partitions."""
        disk = str(self._disk())
        process.run([*_MKE2FS, disk])
        process.run(["mount", "-o", "loop,noatime", disk, str(self.unpacked)])
        try:
            self._extract()
        finally:
            process.run(["umount", str(self.unpacked)])

    def mke2fs(self) -> None:
        """By hand, through a directory."""
        self._extract()
        process.run([*_MKE2FS, "-d", str(self.unpacked), str(self._disk())])

    @property
    def _decompressed(self) -> list[str]:
        return ["zstd", "-qdc", "--long=27", str(self.bundle)]

    def _extract(self) -> None:
        _pipe(self._decompressed, ["tar", "-x", "-C", str(self.unpacked), *archive.UNPACK])

    def _disk(self) -> Path:
        with self.written.open("wb") as file:
            file.truncate(self.layout.size * _MIB)
        return self.written

    # Measuring

    def run(self, name: str, thing: Callable[[], None]) -> None:
        """Do it in a process of its own, and keep what it took."""
        self.unpacked.mkdir()
        process.run(["sync", "-f", str(self.directory)])
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                thing()
                if self.written.exists():
                    sync(self.written)
                status = 0
            finally:
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        took = time.perf_counter() - began
        if status != 0:
            raise SystemExit(f"{name} failed")
        self.runs.setdefault(name, []).append(Run(took, usage.ru_maxrss / 1024))
        # A run that is ended too early has said this much.
        print(f"{name}: {took:.1f} s", flush=True)
        self.look(name)
        self.written.unlink(missing_ok=True)
        remove(self.unpacked)

    def look(self, name: str) -> None:
        """See that all files are in what was written."""
        if name in ("vdibuild, bundle", "tar, zstd"):
            argv = ["tar", "--list", "--use-compress-program=zstd --long=27", f"--file={self.written}"]
            found = process.run(argv, capture=True).stdout.count("/file-")
        elif self.written.exists():
            offset = ways.place_of(self.root)[0] if name.startswith("vdibuild") else 0
            with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
                volume = Path(f"{self.written}?offset={offset}")
                count, free = ext4.numbers(volume, Path(scratch), "Inode count", "Free inodes")
            found = count - free - _INODES_OF_ITS_OWN - len(list(self.tree.iterdir()))
        else:
            return
        if found != self.files:
            raise SystemExit(f"{name}: {found} of {self.files} files are there")


def _pipe(first: Sequence[str], second: Sequence[str], output: int = subprocess.DEVNULL) -> None:
    """Two commands, the one's output the other's input. output: of the second."""
    with subprocess.Popen(first, stdout=subprocess.PIPE) as reading:
        done = subprocess.run(second, stdin=reading.stdout, stdout=output, check=False)
    if reading.returncode or done.returncode:
        raise SystemExit(f"{first[0]} | {second[0]}: {reading.returncode}, {done.returncode}")


def measure(files: int, runs: int, site_file: Path) -> None:
    """Measure all of them in turn, print the tables, and put them into the document."""
    site = sites.load(site_file)
    with tempfile.TemporaryDirectory(dir=site.artifacts_directory, prefix=".bench-") as directory:
        bench = Bench(Path(directory), files)
        bench.prepare()
        things: dict[str, Callable[[], None]] = {
            "vdibuild, bundle": bench.make_bundle,
            "tar, zstd": bench.tar,
            "vdibuild, check": bench.check,
            "zstd, tar --list": bench.names,
            "vdibuild, unpack on a mount": bench.unpack_mounted,
            "mke2fs, mount, tar -x": bench.mount,
            "vdibuild, unpack without a mount": bench.unpack_native,
            "tar -x, mke2fs -d": bench.mke2fs,
        }
        for _ in range(runs):
            for name, thing in things.items():
                bench.run(name, thing)
        stored = bench.bundle.stat().st_size
    said = (
        f"{circumstances()}; medians of {runs}, in parentheses the least and the "
        f"most. {files} files in {-(-files // _IN_A_DIRECTORY)} directories, bundled {stored // _MIB} MiB."
    )
    write([_table(bench.runs)], said, _DOCUMENT, "bench.files")


def _table(runs: Mapping[str, Sequence[Run]]) -> Rows:
    rows = []
    for name, done in runs.items():
        seconds = [run.seconds for run in done]
        peer = _PEERS.get(name)
        ratio = (
            statistics.median(seconds) / statistics.median(run.seconds for run in runs[peer]) if peer else 0
        )
        memory = f"{max(run.memory for run in done):.0f} MiB"
        rows.append((name, spread(seconds), f"{ratio:.2f}" if peer else "", memory))
    columns = ("", "seconds", "to the one below", "memory of the largest process")
    return Rows("A million tiny files", columns, tuple(rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--site", type=Path, default=Path(sites.DEFAULT_NAME))
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("this has to be run by root: it mounts file systems")
    measure(arguments.files, arguments.runs, arguments.site)


if __name__ == "__main__":
    main()
