"""A disk from a tree: one interface over the two ways to write one, and the disk's compression."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from vdibuild import process
from vdibuild.disk import appliance, bootloader, native
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.families import BootFiles
from vdibuild.output import unfinished
from vdibuild.tree import Tree

_MIB = 1 << 20


def choose(layout: Layout) -> tuple[str, str]:
    """Which way the disk is written, and why: ("native" or "appliance", a reason for people)."""
    reasons = [f"LVM (volume group {group.name})" for group in layout.groups]
    reasons += [
        f"{place.holds.kind} on {place.holds.mountpoint}"
        for place in _for_appliance(layout)
        if isinstance(place, Partition) and isinstance(place.holds, FileSystem)
    ]
    if reasons:
        return "appliance", f"{', '.join(reasons)}: only a running kernel writes that"
    return "native", "partitions and file systems that tools write straight into the image"


def write(tree: Tree, layout: Layout, boot: BootFiles | None, output: Path, accelerator: str) -> None:
    """Write a bootable disk from a finished tree.

    The tree's /etc/fstab, boot menu and initramfs are written for this layout already, and
    `bootloader.prepare` has been called; nothing in the tree is changed here. boot: None for a disk without
    a boot loader. output: a raw, sparse image, which is removed again when anything fails. accelerator: kvm
    or tcg, for the appliance where one is needed. Raises VdibuildError when the tree does not fit,
    HostError when the host lacks space or tools.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unfinished(output))
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent))
        )
        with output.open("wb") as file:
            file.truncate(layout.size * _MIB)
        native.write_table(layout, output)
        for partition in layout.partitions:
            if native.handles(partition):
                native.write_partition(tree, layout, partition, output, scratch)
        if remaining := _for_appliance(layout):
            appliance.write(tree, layout, remaining, output, scratch, accelerator)
        if boot:
            bootloader.install(tree, layout, boot, output)


def compress(raw: Path, compressed: Path) -> None:
    """Convert a raw image to a qcow2 with zstd-compressed clusters; what is empty takes no space.

    Raises HostError when there is no space left; what was written is removed then.
    """
    # Larger clusters would save 3 % and make each small read from a clone decompress several times as much.
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]
    with unfinished(compressed):
        # In order: written as they are ready (-W), the clusters would lie differently each time.
        process.run([*argv, "-m", "4", str(raw), str(compressed)])


def _for_appliance(layout: Layout) -> list[Partition | LogicalVolume]:
    return [place for place, _ in layout.volumes if not native.handles(place)]
