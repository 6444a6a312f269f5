"""Volumes that the libguestfs appliance changes: one start for each, of which tests/guest has one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest import test_placement
from tests.guest.test_placement import LAYOUT, MIXED, UUID
from vdibuild.disk.layout import FileSystem, Layout

(BOOT, SWAP, ROOT) = LAYOUT.partitions


def plain(kind: str, table: str = "msdos") -> Layout:
    """/boot, swap, and a root of that kind that grows."""
    root = replace(ROOT, size=520, holds=FileSystem(kind, f"{UUID}3", "/"))
    return replace(LAYOUT, size=600, partitions=(BOOT, SWAP, root))


def logical(kind: str) -> Layout:
    """The mixed layout with a root of another kind."""
    swap, root = MIXED.logical
    return replace(MIXED, logical=(swap, replace(root, holds=FileSystem(kind, f"{UUID}4", "/"))))


@pytest.mark.parametrize(
    ("planned", "size", "device"),
    [
        (plain("xfs"), 1000, False),
        (plain("xfs"), 600, True),
        (plain("btrfs"), 1000, True),
        (logical("ext4"), 1200, True),
        (logical("btrfs"), 801, False),
    ],
    ids=["xfs", "xfs as it is", "btrfs", "ext4 on LVM", "less than an extent"],
)
def test_every_file_is_there(planned: Layout, size: int, device: bool, tmp_path: Path) -> None:
    test_placement.moved(planned, size, tmp_path, device=device)
