"""A disk from a tree: the one interface over the ways to write one, and its compression."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vdibuild import process, progress
from vdibuild.disk import bootloader, native
from vdibuild.disk.layout import FileSystem, Layout
from vdibuild.errors import CommandError, HostError
from vdibuild.families import BootFiles
from vdibuild.tree import Tree

_MIB = 1 << 20


def compress(raw: Path, compressed: Path) -> None:
    """Convert a raw image to a qcow2 with zstd-compressed clusters; what is empty takes no space.

    Raises HostError when there is no space left.
    """
    with _space(compressed):
        process.run(
            [
                *("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"),
                *("-m", "4", "-W", str(raw), str(compressed)),
            ]
        )


def write(tree: Tree, layout: Layout, boot: BootFiles | None, output: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".disk-", dir=output.parent) as scratch, _space(output):
        if boot:
            bootloader.prepare(tree, layout, boot)
        with output.open("wb") as file:
            file.truncate(layout.size * _MIB)
        native.write_table(layout, output)
        for partition in layout.partitions:
            native.write_partition(tree, layout, partition, output, Path(scratch))
        if boot:
            bootloader.install(tree, layout, boot, output)


@contextlib.contextmanager
def _space(output: Path) -> Iterator[None]:
    yield
