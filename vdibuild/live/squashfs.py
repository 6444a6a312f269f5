"""The root file system of a live system: a tree as one compressed, read-only squashfs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vdibuild import process
from vdibuild.errors import VdibuildError
from vdibuild.output import unfinished
from vdibuild.tree import Tree, host_command

_LEVELS = range(1, 23)  # zstd(1), with --ultra

# What the kernel and the first programs fill; and the boot files, which lie beside the squashfs.
_EMPTIED = ("boot", "dev", "proc", "run", "sys", "tmp")


@dataclass(frozen=True)
class Compression:
    """How a squashfs is compressed. level: zstd's, 1 to 22. block: KiB that are compressed as one."""

    method: Literal["zstd", "xz"] = "zstd"
    level: int = 15
    block: int = 1024

    @property
    def options(self) -> list[str]:
        """mksquashfs's options. Raises VdibuildError for a level that zstd does not have."""
        options = ["-comp", self.method, "-b", f"{self.block}K"]
        if self.method == "xz":
            # The filter for x86's jumps, beside none: the smaller result counts, block by block.
            return [*options, "-Xbcj", "x86"]
        if self.level not in _LEVELS:
            raise VdibuildError(f"zstd has no level {self.level}", "give one from 1 to 22")
        return [*options, "-Xcompression-level", str(self.level)]


def create(tree: Tree, output: Path, compression: Compression, left_out: Sequence[str] = ()) -> None:
    """Write a tree as a squashfs: owners, modes, xattrs (capabilities, ACLs, SELinux labels) are kept.

    The directories that are filled at boot, /boot, and those in `left_out` (of no use to the running system)
    are there but empty. No time in it is later than SOURCE_DATE_EPOCH, where that is set; then the same tree
    gives the same bytes. output: the new file, which is removed again when anything fails. Raises HostError
    when the disk is full, CommandError.
    """
    argv = ["mksquashfs", str(tree.root), str(output), "-noappend", "-no-progress", "-xattrs"]
    argv += ["-reproducible", *compression.options, "-wildcards"]
    for name in (*_EMPTIED, *(path.lstrip("/") for path in left_out)):
        # `*` does not match the names that begin with a dot.
        argv += ["-e", f"{name}/*", "-e", f"{name}/.*"]
    with unfinished(output):
        process.run(host_command(argv))
