"""A volume's system, each file of it, however it came there; on a file and on a block device."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.guest import systems
from vdibuild import bundle, hashing
from vdibuild.disk import grow, lvm, write
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition, VolumeGroup
from vdibuild.errors import VdibuildError
from vdibuild.provision.identity import Identity
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.provision.ways import Placement, Way
from vdibuild.recipe import NetworkInterface
from vdibuild.settings.keys import Keys
from vdibuild.store import BUNDLE, DISK, Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and mounts need root")

UUID = "5e9f4c6e-0f5c-4b8e-9a3c-1d2e3f40516"
LAYOUT = Layout(
    "msdos",
    "bios",
    300,
    "0x4f3a2b1c",
    (
        Partition(1, 1, 63, "83", "", FileSystem("ext4", f"{UUID}1", "/boot")),
        Partition(2, 64, 16, "82", "", FileSystem("swap", f"{UUID}2", "swap")),
        Partition(3, 80, 220, "83", "", FileSystem("ext4", f"{UUID}3", "/")),
    ),
)
COPY, NATIVE, MOUNT = ("copy", "native"), ("unpack", "native"), ("unpack", "mount")
IDENTITY = Identity("web", ("ssh-ed25519 AAAA",), NetworkInterface("link", 0), "52:54:00:00:00:01")
CHANGED = (
    *("etc", "root", "boot", "etc/hostname", "etc/hosts", "etc/machine-id", "etc/systemd", "lost+found"),
    *("etc/ssh", "etc/ssh/ssh_host_rsa_key"),
)
FORMER = b"\xa5" * 512
"""What a block device held before."""


@dataclass
class Stored:
    """A sealed system with a disk and a bundle, and the tree that both were made from: a Source."""

    archive: Path
    disk: tuple[Path, str] | None
    tree: Path
    name: str = "image"
    version: str = "20260101.1"
    family: str = "debian"
    layout: Layout | None = LAYOUT
    sealed: bool = True

    @property
    def size(self) -> int:
        return self.archive.stat().st_size

    def trust(self, *, archive: bool) -> None:
        """Nobody signed it."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("system") / "tree"
    root.mkdir()
    tree = systems.system(root)
    tree.write("/usr/lib/systemd/system/systemd-networkd.service", "")
    boot = systems.bootable(tree, LAYOUT)
    (root / "usr/large").write_bytes(os.urandom(20 << 20))
    systems.hostile(root / "srv", 1024, 64 << 20)
    version = root.parent / "version"
    version.mkdir()
    write.write(tree, LAYOUT, boot, version / "raw", "tcg")
    write.compress(version / "raw", version / DISK)
    (version / "raw").unlink()
    bundle.create(tree, version / BUNDLE, None)
    disk = version / DISK
    return Stored(version / BUNDLE, (disk, hashing.of_file(disk)), root)


@contextlib.contextmanager
def volume(directory: Path, size: int, *, device: bool) -> Iterator[Path]:
    """An empty file, or a block device that held something else before."""
    file = directory / "volume"
    with file.open("wb") as made:
        made.truncate(size << 20)
    if not device:
        yield file
        return
    with file.open("r+b") as made:
        for _ in range(size):
            made.write(FORMER * 2048)
    with systems.loop(file, 0, size) as path:
        yield Path(path)


def put(
    stored: Stored, directory: Path, kind: tuple[Any, Any], size: int, place: Path, layout: Layout = LAYOUT
) -> Placement:
    scratch = directory / "scratch"
    scratch.mkdir()
    prepared = PreparedDisks(directory / "disks", Store(directory / "artifacts", Keys()))
    way = Way(*kind, "", grow.resized(layout, size))
    placed = Placement(stored, way, place, size, IDENTITY, scratch, directory, "tcg", prepared)
    placed.put()
    return placed


@pytest.mark.parametrize(
    ("way", "size", "device"),
    [(COPY, 500, False), (COPY, 300, True), (NATIVE, 280, False), (MOUNT, 280, False), (MOUNT, 400, True)],
)
def test_every_file_is_there(
    stored: Stored, tmp_path: Path, way: tuple[str, str], size: int, device: bool
) -> None:
    with volume(tmp_path, size, device=device) as place:
        put(stored, tmp_path, way, size, place)
    disk = tmp_path / "volume"
    assert disk.stat().st_size == size << 20
    assert FORMER not in disk.read_bytes(), "what the device held before"
    subprocess.run(["sfdisk", "--verify", disk], check=True)
    with systems.mounted(disk, 1, 63, tmp_path / "boot", "ro") as boot:
        assert (boot / "vmlinuz-1").read_text() == "kernel" * 1000
    with systems.mounted(disk, 80, size - 80, tmp_path / "root", "ro") as root:
        # mke2fs keeps whole seconds.
        resolution = 1 if way is MOUNT else 10**9
        found = systems.seen(root, sockets=False, resolution=resolution)
        expected = systems.seen(stored.tree, sockets=False, resolution=resolution)
        space = os.statvfs(root)
        assert (root / "etc/hostname").read_text() == "web\n"
    assert space.f_blocks * space.f_frsize > (size - 80 - 24) << 20
    same = {path for path in expected if path not in CHANGED and not path.startswith("boot/")}
    assert {path: found.get(path) for path in same} == {path: expected[path] for path in same}
    # GRUB is where the firmware looks for it.
    assert disk.read_bytes()[: 1 << 20].count(b"GRUB \0Geom") == 1
    loops = subprocess.run(["losetup", "--all"], check=True, capture_output=True, text=True).stdout
    assert str(tmp_path) not in loops


@pytest.mark.parametrize("way", [NATIVE, MOUNT])
def test_what_does_not_fit(stored: Stored, tmp_path: Path, way: tuple[str, str]) -> None:
    with (
        volume(tmp_path, 86, device=False) as place,
        pytest.raises(VdibuildError, match="does not fit"),
    ):
        put(stored, tmp_path, way, 86, place)
    assert "volume" not in subprocess.run(["losetup", "--all"], capture_output=True, text=True).stdout


MIXED = Layout(
    "msdos",
    "bios",
    800,
    "0x4f3a2b1c",
    (
        Partition(1, 1, 63, "83", "", FileSystem("ext4", f"{UUID}1", "/boot")),
        Partition(2, 64, 200, "83", "", FileSystem("btrfs", f"{UUID}2", "/srv")),
        Partition(3, 264, 536, "8e", "", "vg-0", "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"),
    ),
    (VolumeGroup("vg-0", 4, "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb"),),
    (
        LogicalVolume(
            "vg-0",
            "swap",
            16,
            "cccccc-cccc-cccc-cccc-cccc-cccc-cccccc",
            FileSystem("swap", f"{UUID}3", "swap"),
        ),
        LogicalVolume(
            "vg-0", "root", 516, "dddddd-dddd-dddd-dddd-dddd-dddd-dddddd", FileSystem("xfs", f"{UUID}4", "/")
        ),
    ),
)
HOSTILE = {"ext4": 1024, "xfs": 60 << 10, "btrfs": 12 << 10}
"""Bytes of an extended attribute that each kind of file system takes."""
LABEL = "security.selinux"


def test_what_needs_a_kernel_to_grow(tmp_path: Path) -> None:
    """XFS on LVM grows in the appliance, and nothing of it or of the btrfs beside it is lost."""
    moved(MIXED, 1200, tmp_path, device=False)


def moved(planned: Layout, size: int, directory: Path, *, device: bool) -> None:
    """Put an image of that layout, made by this host's own tools, on a volume of `size` MiB; look at it."""
    raw, compressed = directory / "raw", directory / DISK
    systems.made(planned, raw)
    before = {}
    for place, fs in planned.mounts:
        with systems.mounted(raw, *systems.place_of(planned, place), directory / "mounted") as top:
            if fs.mountpoint == "/":
                system(top, planned)
            if fs.mountpoint != "/boot":
                systems.hostile(top / "hostile", HOSTILE[fs.kind], 64 << 20)
                systems.immutable(top / "hostile")
            (top / "large").write_bytes(os.urandom(5 << 20))
            before[fs.mountpoint] = systems.seen(top)
    write.compress(raw, compressed)
    raw.unlink()
    source = Stored(directory / BUNDLE, (compressed, hashing.of_file(compressed)), directory)
    with volume(directory, size, device=device) as target:
        placed = put(source, directory, ("copy", "appliance"), size, target, planned)
    disk = directory / "volume"
    assert FORMER not in disk.read_bytes(), "what the device held before"
    subprocess.run(["sfdisk", "--verify", disk], check=True)
    for group in placed.layout.groups:
        grew(disk, placed.layout, group)
    for place, fs in placed.layout.mounts:
        start, room = systems.place_of(placed.layout, place)
        with systems.mounted(disk, start, room, directory / "mounted", "ro") as top:
            after = systems.seen(top)
            if fs.mountpoint == "/":
                identified(top)
            space = os.statvfs(top)
        same = [path for path in before[fs.mountpoint] if fs.mountpoint != "/" or path not in CHANGED]
        assert {path: after.get(path) for path in same} == {
            path: before[fs.mountpoint][path] for path in same
        }
        # Of a file system some is its own: XFS's log, ext4's inode tables.
        assert space.f_blocks * space.f_frsize > room * 85 << 20 // 100
    assert not list((directory / "scratch").iterdir())


def system(top: Path, planned: Layout) -> None:
    """A small system with SELinux labels, and with what a personalised one replaces."""
    tree = systems.system(top)
    tree.write("/usr/lib/systemd/system/systemd-networkd.service", "")
    tree.write("/etc/fstab", "")
    for _, fs in planned.mounts:
        tree.make_directory(fs.mountpoint)
    tree.write("/etc/hostname", "golden\n")
    tree.link("/etc/hosts", "/nowhere")
    tree.write("/etc/ssh/ssh_host_rsa_key", "secret", 0o600)
    for path, label in (("etc", "etc_t"), ("etc/hostname", "hostname_etc_t"), ("root", "admin_home_t")):
        tree.make_directory("/root", 0o700)
        os.setxattr(top / path, LABEL, f"system_u:object_r:{label}:s0\0".encode())


def identified(top: Path) -> None:
    """What the personalised system has of its own, with the labels that belong to it."""
    assert (top / "etc/hostname").read_text() == "web\n"
    assert (top / "etc/machine-id").read_text() == ""
    assert not (top / "etc/hosts").is_symlink() and "web" in (top / "etc/hosts").read_text()
    assert not list((top / "etc/ssh").iterdir())
    keys = top / "root/.ssh/authorized_keys"
    assert keys.read_text() == "ssh-ed25519 AAAA\n"
    modes = {path: oct(path.stat().st_mode & 0o7777) for path in (keys, keys.parent, top / "etc/hostname")}
    assert modes == {keys: "0o600", keys.parent: "0o700", top / "etc/hostname": "0o644"}
    labels = {
        path: os.getxattr(top / path, LABEL).rstrip(b"\0").decode().split(":")[2]
        for path in ("etc/hostname", "etc/hosts", "etc/machine-id", "root/.ssh", "root/.ssh/authorized_keys")
    }
    assert list(labels.values()) == ["hostname_etc_t", "net_conf_t", "etc_t", "ssh_home_t", "ssh_home_t"]


def grew(disk: Path, planned: Layout, group: VolumeGroup) -> None:
    """LVM's own words of a group on a disk are the planned ones."""
    (physical,) = planned.physical(group)
    with disk.open("rb") as file:
        file.seek(physical.start << 20)
        found = lvm.read(file.read(1 << 20))
    assert found is not None and found.group_name == group.name
    for one in planned.logical:
        said = found.group["logical_volumes"][one.name]
        extents = sum(said[f"segment{number + 1}"]["extent_count"] for number in range(said["segment_count"]))
        assert extents * group.extent == one.size
