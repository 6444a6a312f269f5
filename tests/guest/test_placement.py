"""A volume's system, each file of it, in every way that needs no guest; on a file and on a block device."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest import systems
from tests.unit.test_store import described
from vdibuild import bundle
from vdibuild.disk import write
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.errors import VdibuildError
from vdibuild.manifest import Manifest, StoredFile
from vdibuild.provision.identity import Identity
from vdibuild.provision.ways import Placement, Way
from vdibuild.recipe import NetworkInterface
from vdibuild.store import BUNDLE, DISK, Staging

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
COPY = Way("copy", "native", "")
NATIVE, MOUNT = (Way("unpack", "native", ""), Way("unpack", "mount", ""))
IDENTITY = Identity("web", ("ssh-ed25519 AAAA",), NetworkInterface("link", 0))
CHANGED = ("etc", "root", "boot", "etc/hostname", "etc/hosts", "etc/machine-id", "etc/systemd", "lost+found")


@dataclass
class Stored:
    """A version with a disk and a bundle, and the tree that both were made from."""

    path: Path
    manifest: Manifest
    tree: Path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    root = tmp_path_factory.mktemp("system") / "tree"
    root.mkdir()
    tree = systems.system(root)
    tree.write("/usr/lib/systemd/system/systemd-networkd.service", "")
    boot = systems.bootable(tree, LAYOUT)
    (root / "usr/large").write_bytes(os.urandom(20 << 20))
    systems.hostile(root / "srv", 1024, 64 << 20)
    version = root.parent / "version"
    version.mkdir()
    try:
        write.write(tree, LAYOUT, boot, version / "raw", "tcg")
        write.compress(version / "raw", version / DISK)
        (version / "raw").unlink()
        bundle.create(tree, version / BUNDLE, None)
        files = {BUNDLE: StoredFile(size=(version / BUNDLE).stat().st_size, sha256="0" * 64)}
        manifest = described(Staging("image", "20260101.1", version), layout=LAYOUT, files=files)
        yield Stored(version, manifest, root)
    finally:
        systems.thaw(root / "srv")


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
            made.write(b"\xa5" * (1 << 20))
    with systems.loop(file, 0, size) as path:
        yield Path(path)


def put(stored: Stored, directory: Path, way: Way, size: int, place: Path) -> None:
    scratch = directory / "scratch"
    scratch.mkdir()
    Placement(stored.path, stored.manifest, place, size, IDENTITY, scratch, "tcg").put(way)


@pytest.mark.parametrize(
    ("way", "size", "device"),
    [(COPY, 500, False), (COPY, 300, True), (NATIVE, 280, False), (MOUNT, 280, False), (MOUNT, 400, True)],
)
def test_every_file_is_there(stored: Stored, tmp_path: Path, way: Way, size: int, device: bool) -> None:
    with volume(tmp_path, size, device=device) as place:
        put(stored, tmp_path, way, size, place)
    disk = tmp_path / "volume"
    assert disk.stat().st_size == size << 20
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
def test_what_does_not_fit(stored: Stored, tmp_path: Path, way: Way) -> None:
    with (
        volume(tmp_path, 86, device=False) as place,
        pytest.raises(VdibuildError, match="does not fit"),
    ):
        put(stored, tmp_path, way, 86, place)
    assert "volume" not in subprocess.run(["losetup", "--all"], capture_output=True, text=True).stdout
