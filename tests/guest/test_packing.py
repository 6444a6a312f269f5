"""Bundles made of disks, and of directories that several file systems are mounted in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.guest import systems
from tests.guest.systems import Made
from vdibuild import packing
from vdibuild.bundle import ARCHIVE

ROOT = "11111111-2222-3333-4444-555555555555"
BOOT = "66666666-7777-8888-9999-aaaaaaaaaaaa"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with a hostile root file system, which also has a separate /boot."""
    raw, mountpoint = tmp_path / "disk.raw", tmp_path / "mounted"
    parts = [
        Made(1, 100, "83", ("mkfs.ext3", "-q", "-U", BOOT)),
        Made(101, 800, "83", ("mkfs.ext4", "-q", "-U", ROOT)),
    ]
    systems.disk(raw, 1000, "dos", parts)
    systems.grub(raw)
    with systems.mounted(raw, 101, 800, mountpoint) as root:
        systems.system(root)
        systems.hostile(root / "srv", 3500)
        systems.immutable(root / "srv")
        systems.fstab(root, [f"UUID={ROOT} / ext4 defaults 0 1", "LABEL=none /data xfs nofail 0 0"])
        with (root / "etc/fstab").open("a") as file:
            file.write(f"UUID={BOOT} /boot ext3 noatime 0 2\n")
    with systems.mounted(raw, 1, 100, mountpoint) as boot:
        (boot / "vmlinuz-1").write_text("kernel")
    return raw


def test_a_disks_bundle_has_all_its_files(disk: Path, tmp_path: Path) -> None:
    described = packing.pack(disk, tmp_path / "bundle", accelerator="tcg")
    assert described.layout and [fs.mountpoint for _, fs in described.layout.mounts] == ["/", "/boot"]
    assert described.layout.boot.options == "noatime"
    assert described.size < 20 << 20, "4 GiB of holes take no room"
    packing.unpack(tmp_path / "bundle", tmp_path / "out", devices=True)
    with systems.mounted(disk, 101, 800, tmp_path / "mounted", "ro") as root:
        expected = systems.seen(root, sockets=False)
    found = systems.seen(tmp_path / "out")
    assert found.pop("boot/vmlinuz-1")
    expected.pop("boot/vmlinuz-1")
    for system in (found, expected):
        for place in ("lost+found", "boot"):  # the root of /boot's file system is another directory
            system.pop(place, None)
    assert found == expected


def test_what_is_mounted_below_a_directory_belongs_to_it_or_not(disk: Path, tmp_path: Path) -> None:
    with (
        systems.mounted(disk, 101, 800, tmp_path / "mounted", "ro") as root,
        systems.mounted(disk, 1, 100, root / "boot", "ro"),
    ):
        packing.pack(root, tmp_path / "all", accelerator="tcg", exclude=["srv"])
        packing.pack(root, tmp_path / "one", accelerator="tcg", exclude=["srv"], one_file_system=True)
    names = {}
    for name in ("all", "one"):
        argv = ["tar", "--list", "--zstd", "--file", str(tmp_path / name / ARCHIVE)]
        names[name] = set(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())
    assert names["all"] - names["one"] == {"./boot/vmlinuz-1"}
    assert {"./boot/", "./etc/fstab"} < names["one"]
    assert not any(path.startswith("./srv") for path in names["all"])
