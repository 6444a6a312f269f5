"""Disks that are not understood: one clear error each, before anything is done, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest import systems
from tests.guest.systems import Made
from vdibuild import packing
from vdibuild.disk import inspection, layout, lvm, native, shrink
from vdibuild.errors import InputError
from vdibuild.recipe import Storage, Volume, VolumeGroup

ROOT = "11111111-2222-3333-4444-555555555555"
OTHER = "66666666-7777-8888-9999-aaaaaaaaaaaa"
SIZE = 200
START = 1


def small_disk(raw: Path, lines: tuple[str, ...] = (), release: str = "ID=debian\n") -> Path:
    """A disk with GRUB, a root file system of ext4, and 40 MiB that are free for a test."""
    parts = [Made(START, 150, "83", ("mkfs.ext4", "-q", "-U", ROOT)), Made(151, 40, "83")]
    systems.disk(raw, SIZE, "dos", parts)
    systems.grub(raw)
    with systems.mounted(raw, START, 150, raw.with_name("mounted")) as root:
        (root / "etc").mkdir()
        (root / "etc/os-release").write_text(release)
        systems.fstab(root, [f"UUID={ROOT} / ext4 defaults 0 1", *lines])
    return raw


def second(raw: Path, *command: str) -> None:
    """Make something on the second partition."""
    with systems.loop(raw, 151, 40) as device:
        subprocess.run([*command, device], check=True, capture_output=True)


def put(raw: Path, offset: int, data: bytes) -> None:
    """Write into the second partition."""
    with raw.open("r+b") as file:
        file.seek((151 << 20) + offset)
        file.write(data)


def luks(raw: Path) -> None:
    header = b"LUKS\xba\xbe\0\2" + (16384).to_bytes(8, "big") + (1).to_bytes(8, "big")
    put(raw, 0, header.ljust(168, b"\0") + ROOT.encode().ljust(40, b"\0"))


def raid(raw: Path) -> None:
    # Linux: include/uapi/linux/raid/md_p.h, struct mdp_superblock_1: magic, version; its place: super_offset
    block = bytearray(256)
    block[0:8] = (0xA92B4EFC).to_bytes(4, "little") + (1).to_bytes(4, "little")
    block[144:152] = (8).to_bytes(8, "little")
    checksum = sum(int.from_bytes(block[at : at + 4], "little") for at in range(0, 256, 4))
    block[216:220] = ((checksum & 0xFFFFFFFF) + (checksum >> 32)).to_bytes(4, "little")
    put(raw, 4096, bytes(block))


def hibernated(raw: Path) -> None:
    second(raw, "mkswap")
    put(raw, 4086, b"S1SUSPEND\0")


def a_second_system(raw: Path) -> None:
    second(raw, "mkfs.ext4", "-q", "-U", OTHER)
    with systems.mounted(raw, 151, 40, raw.with_name("mounted")) as root:
        (root / "etc").mkdir()
        (root / "etc/os-release").write_text('PRETTY_NAME="Another system"\n')


def nothing(raw: Path) -> None:
    """The second partition is empty."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (luks, r"partition 2 holds encrypted \(LUKS\)"),
        (raid, "partition 2 holds a member of a RAID"),
        (hibernated, "partition 2 holds the memory of a hibernated machine"),
        (a_second_system, "there are 2 systems on it: .*Another system"),
        (nothing, "partition 2 holds nothing that is known"),
        (lambda raw: second(raw, "mkfs.minix"), "partition 2 holds minix"),
        (lambda raw: os.truncate(raw, 160 << 20), "partition 2 ends behind the disk's end"),
        (lambda raw: os.truncate(raw, 100), "no partition table"),
    ],
)
def test_a_disk_that_is_not_understood(change: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw")
    change(raw)
    with pytest.raises(InputError, match=reason) as caught:
        shrink.shrink(raw, tmp_path / "small.qcow2", headroom=0, accelerator="tcg", boot_seconds=None)
    assert str(raw) in caught.value.message
    assert not list(tmp_path.glob("*.qcow2")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"UUID={OTHER} /data ext4 defaults 0 2", f"mounts UUID={OTHER} on /data, which is not on this disk"),
        ("/dev/sdb1 /data xfs defaults 0 2", "mounts /dev/sdb1 on /data"),
    ],
)
def test_a_system_that_needs_another_disk(line: str, reason: str, tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw", (line,))
    second(raw, "mkswap")
    with pytest.raises(InputError, match=reason):
        inspection.inspect(raw, tmp_path, "tcg")


HARMLESS = (
    f"UUID={OTHER} /data ext4 defaults,nofail 0 2",
    "/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0",
    "server:/export /srv nfs defaults 0 0",
    "//server/share /share cifs defaults 0 0",
    "tmpfs /tmp tmpfs size=50% 0 0",
    "/swapfile none swap sw 0 0",
    "/var/a\\040b /mnt none bind 0 0",
    "# a comment",
    "nonsense",
)


def test_what_a_system_can_do_without_does_not_matter(tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw", HARMLESS)
    second(raw, "mkswap")
    found = inspection.inspect(raw, tmp_path, "tcg")
    assert [mount.mountpoint for mount in found.mounts] == ["/"]


def test_a_file_system_that_is_not_mounted_shrinks_but_is_no_part_of_the_tree(tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw")
    second(raw, "mkfs.ext4", "-q", "-U", OTHER)
    done = shrink.shrink(raw, tmp_path / "small.qcow2", headroom=1, accelerator="tcg", boot_seconds=None)
    assert done.after < SIZE << 20
    with pytest.raises(InputError, match="partition 2 holds ext4, but /etc/fstab does not mount it"):
        packing.pack(raw, tmp_path / "bundle", accelerator="tcg")
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("release", "reason"), [("ID=plan9\nPRETTY_NAME=Plan\n", "it holds Plan")])
def test_a_family_that_is_not_known(release: str, reason: str, tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw", release=release)
    second(raw, "mkswap")
    with pytest.raises(InputError, match=reason):
        inspection.inspect(raw, tmp_path, "tcg")


def test_a_disk_without_a_boot_loader(tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw")
    second(raw, "mkswap")
    with raw.open("r+b") as file:
        file.write(bytes(400))
    with pytest.raises(InputError, match="nothing on it is known to boot it"):
        inspection.inspect(raw, tmp_path, "tcg")


def test_grub_in_a_file_system_is_not_moved(tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw")
    second(raw, "mkswap")
    systems.grub(raw, 190 * 2048)
    with pytest.raises(InputError, match="GRUB's core image is at sector 389120, in no place of its own"):
        shrink.shrink(raw, tmp_path / "small.qcow2", headroom=0, accelerator="tcg", boot_seconds=None)


def test_a_disk_that_is_as_small_as_it_can_be(tmp_path: Path) -> None:
    raw = small_disk(tmp_path / "disk.raw")
    second(raw, "mkswap")
    once = tmp_path / "once.qcow2"
    shrink.shrink(raw, once, headroom=20, accelerator="tcg", boot_seconds=None)
    with pytest.raises(InputError, match=r"it cannot shrink: its content needs \d+ MiB of \d+ MiB"):
        shrink.shrink(once, tmp_path / "twice.qcow2", headroom=1000, accelerator="tcg", boot_seconds=None)
    with pytest.raises(InputError, match="over the image it is made from"):
        shrink.shrink(once, once, headroom=0, accelerator="tcg", boot_seconds=None)
    assert sorted(path.name for path in tmp_path.glob("*.qcow2")) == ["once.qcow2"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-f", "qcow2", "-b", "/etc/shadow", "-F", "raw"), "needs a backing file: /etc/shadow"),
        (("-f", "qcow2", "-o", "data_file=outside.raw"), "needs a data file: outside.raw"),
        (("-f", "vmdk"), "is a vmdk image"),
    ],
)
def test_an_image_that_is_not_all_there(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "create", "-q", *options, image, "64M"], check=True, cwd=tmp_path, capture_output=True
    )
    with pytest.raises(InputError, match=reason):
        inspection.inspect(image, tmp_path, "tcg")


@pytest.mark.parametrize("name", ["nothing", "directory"])
def test_what_is_no_image(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match=f"{name}: (cannot be read|is neither a file)"):
        inspection.inspect(tmp_path / name, tmp_path, "tcg")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('type = "striped"', 'type = "thin"  ', "root is of the kind thin"),
        ("stripe_count = 1", "stripe_count = 2", "root is of the kind striped"),
        ('stripes = ["pv0", 0]', 'stripes = ["pv0", 9]', "behind the disk's end|damaged|is a physical"),
        ("segment1 {", "segment1 [", "not understood|damaged"),
    ],
)
def test_volumes_that_are_not_plain(old: str, new: str, reason: str, tmp_path: Path) -> None:
    raw, _ = group_disk(tmp_path)
    data = raw.read_bytes()
    assert data.count(old.encode()) == 1
    raw.write_bytes(data.replace(old.encode(), new.encode().ljust(len(old))))
    with pytest.raises(InputError, match=reason):
        inspection.inspect(raw, tmp_path, "tcg")


def test_a_group_with_a_disk_elsewhere(tmp_path: Path) -> None:
    raw, planned = group_disk(tmp_path)
    identity = planned.partitions[0].physical_uuid
    data = raw.read_bytes()
    raw.write_bytes(data.replace(f'id = "{identity}"'.encode(), f'id = "{identity[::-1]}"'.encode()))
    with pytest.raises(InputError, match="a physical volume that is not on this disk"):
        inspection.inspect(raw, tmp_path, "tcg")


def group_disk(directory: Path) -> tuple[Path, layout.Layout]:
    """A disk with a volume group, and nothing on its one volume."""
    volumes = (Volume("/", "ext4", 100, 2, grow=True, name="root", group="vg"),)
    storage = Storage(
        (Volume("pv.1", "lvmpv", 100, 1, grow=True),), (VolumeGroup("vg", ("pv.1",), 1),), volumes
    )
    planned = layout.plan(storage, "bios", SIZE, "msdos", "seed", Path("x.ks"))
    raw = directory / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE << 20)
    native.write_table(planned, raw)
    lvm.write(planned, planned.groups[0], raw, 0)
    return raw, planned
