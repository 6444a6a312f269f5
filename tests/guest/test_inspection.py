"""Disks read back: what `write` has written, and what the host's own tools have made."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest import systems
from vdibuild.disk import inspection, layout, write
from vdibuild.recipe import Storage, Volume, VolumeGroup
from vdibuild.tree import Tree

SECOND = 1_000_000_000
BIOS_BOOT = Volume("biosboot", "biosboot", 1, 1)
ESP = Volume("/boot/efi", "vfat", 64, 2)
BOOT = Volume("/boot", "ext4", 64, 3, options="noatime", label="boot")
SWAP = Volume("swap", "swap", 16, 4, label="swap")
HOME = Volume("/home", "ext4", 32, 6)
PHYSICAL = (Volume("pv.1", "lvmpv", 300, 1), Volume("pv.2", "lvmpv", 300, 2, grow=True))
GROUP = VolumeGroup("vg-disk", ("pv.1", "pv.2"), 3)


def root(filesystem: str, options: str = "") -> Volume:
    return Volume("/", filesystem, 350, 5, grow=True, label="root", options=options)


def logical(filesystem: str) -> tuple[Volume, ...]:
    return (
        replace(root(filesystem), name="root", group="vg-disk"),
        replace(HOME, name="home-1", group="vg-disk"),
        replace(SWAP, name="swap", group="vg-disk"),
    )


LAYOUTS = {
    "bios-msdos-ext4-swap": ("bios", "msdos", Storage((SWAP, root("ext4", "noatime,discard")))),
    "bios-gpt-ext4-boot-home": ("bios", "gpt", Storage((BIOS_BOOT, BOOT, HOME, root("ext4")))),
    "uefi-gpt-ext4-boot": ("uefi", "gpt", Storage((ESP, BOOT, root("ext4")))),
    "uefi-msdos-btrfs-swap": ("uefi", "msdos", Storage((ESP, SWAP, root("btrfs", "compress=zstd")))),
    "bios-msdos-lvm-ext4": ("bios", "msdos", Storage(PHYSICAL, (GROUP,), logical("ext4"))),
    "uefi-gpt-lvm-xfs-boot": ("uefi", "gpt", Storage((ESP, BOOT, *PHYSICAL), (GROUP,), logical("xfs"))),
}


@pytest.fixture
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A system with a hostile directory in it."""
    directory = tmp_path / "tree"
    directory.mkdir()
    systems.system(directory)
    # mkfs.btrfs makes zeros of holes.
    sparse = 0 if "btrfs" in request.node.name else systems.SPARSE
    systems.hostile(directory / "srv", 3000, sparse)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_written_is_found_and_its_files_come_out_as_they_went_in(
    name: str, tree: Path, tmp_path: Path
) -> None:
    firmware, table, storage = LAYOUTS[name]
    planned = layout.plan(storage, firmware, 800, table, "seed", Path("disk.ks"))
    boot = systems.bootable(Tree(tree), planned)
    raw = tmp_path / "disk.raw"
    write.write(Tree(tree), planned, boot, raw, "tcg")
    before = digest(raw)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with inspection.opened(raw, scratch, "tcg") as disk:
        assert disk.found.layout == planned
        assert disk.found.firmware == firmware
        assert disk.found.family == "debian"
        assert all(0 < usage.used <= usage.total for usage in disk.found.usage.values())
        disk.extract(tmp_path / "out")
    # mke2fs writes whole seconds only.
    expected = systems.seen(tree, sockets=False, resolution=SECOND)
    found = systems.seen(tmp_path / "out", resolution=SECOND)
    if planned.root.kind == "btrfs":
        # mkfs.btrfs 6.2 writes device numbers as glibc has them; the kernel reads others.
        for device in ("srv/character", "srv/block"):
            del found[device], expected[device]
    assert found == expected
    assert digest(raw) == before, "the disk is not changed"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
