"""Disks that this host's own tools made, shrunk, and read back by its kernel: nothing of a file is lost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.guest import systems
from tests.guest.systems import Made
from vdibuild.disk import inspection, layout, lvm, native, shrink
from vdibuild.disk.shrink import Shrunk
from vdibuild.recipe import Storage, Volume, VolumeGroup

ROOT = "11111111-2222-3333-4444-555555555555"
BOOT = "66666666-7777-8888-9999-aaaaaaaaaaaa"
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
SWAP = "bbbbbbbb-cccc-dddd-eeee-ffffffffffff"


def small(source: Path, output: Path, headroom: int = 20) -> Shrunk:
    return shrink.shrink(source, output, headroom=headroom, accelerator="tcg", boot_seconds=None)


def raw_of(image: Path) -> Path:
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    return raw


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def table(raw: Path) -> dict[int, tuple[int, int, str, str]]:
    """Start and size in sectors, type and UUID, by partition."""
    said = subprocess.run(["sfdisk", "--json", raw], check=True, capture_output=True, text=True).stdout
    return {
        int(part["node"].removeprefix(str(raw))): (
            part["start"],
            part["size"],
            part["type"],
            part.get("uuid", ""),
        )
        for part in json.loads(said)["partitiontable"]["partitions"]
    }


def fill_esp(raw: Path, offset: int, directory: Path) -> None:
    """Put programs and a hidden file on a FAT file system of a disk."""
    files = directory / "esp" / "EFI"
    (files / "BOOT").mkdir(parents=True)
    (files / "BOOT/BOOTX64.EFI").write_bytes(os.urandom(3 << 20))
    (files / "debian").mkdir()
    (files / "debian/a long name of a file.cfg").write_text("configfile\n")
    subprocess.run(["mcopy", "-i", f"{raw}@@{offset}", "-s", "-Q", files, "::/"], check=True)
    hidden = ["mattrib", "-i", f"{raw}@@{offset}", "+h", "+r", "::/EFI/debian/a long name of a file.cfg"]
    subprocess.run(hidden, check=True)


def esp_of(raw: Path, offset: int) -> tuple[str, str, str]:
    """Names, sizes, times and attributes of what is on a FAT file system, and the digest of its program."""
    image = ["-i", f"{raw}@@{offset}"]
    said = [
        subprocess.run([*command, *image, *rest], check=True, capture_output=True).stdout
        for command, rest in (
            (["mdir"], ["-/", "::/"]),
            (["mattrib"], ["-/", "::/"]),
            (["mtype"], ["::/EFI/BOOT/BOOTX64.EFI"]),
        )
    ]
    listing = "".join(line for line in said[0].decode().splitlines(True) if "bytes free" not in line)
    return listing, said[1].decode(), hashlib.sha256(said[2]).hexdigest()


def test_mbr_with_logical_partitions_as_debians_installer_makes_them(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source.raw", tmp_path / "mounted"
    systems.disk(
        source,
        3000,
        "dos",
        [
            Made(1, 500, "83", ("mkfs.ext2", "-U", BOOT), 1),
            Made(502, 2400, "5", (), 2),
            Made(503, 2000, "83", ("mkfs.ext4", "-U", ROOT, "-L", "a root"), 5),
            Made(2504, 300, "82", ("mkswap", "-U", SWAP), 6),
        ],
    )
    systems.grub(source)
    with systems.mounted(source, 503, 2000, mountpoint) as root:
        systems.system(root)
        systems.hostile(root / "srv", 3500)
        systems.immutable(root / "srv")
        systems.fstab(
            root,
            [
                f"UUID={ROOT} / ext4 errors=remount-ro 0 1",
                f"UUID={BOOT} /boot ext2 defaults 0 2",
                f"UUID={SWAP} none swap sw 0 0",
                "/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0",
            ],
        )
        expected = systems.seen(root)
    with systems.mounted(source, 1, 500, mountpoint) as boot:
        (boot / "vmlinuz").write_bytes(os.urandom(20 << 20))
        expected_boot = systems.seen(boot)
    before = digest(source)
    done = small(source, tmp_path / "small.qcow2")
    assert digest(source) == before
    assert (done.found.family, done.found.firmware) == ("debian", "bios")
    assert done.found.types == {"partition 1": "ext2", "partition 5": "ext4", "partition 6": "swap"}
    raw = raw_of(tmp_path / "small.qcow2")
    assert raw.stat().st_size == done.after < 250 << 20
    old, new = table(source), table(raw)
    assert {number: part[2:] for number, part in new.items()} == {
        number: part[2:] for number, part in old.items()
    }
    assert new[1][0] == old[1][0]
    with source.open("rb") as one, raw.open("rb") as other:
        assert one.read(440) == other.read(440)
        one.seek(512), other.seek(512)
        assert one.read(2047 * 512) == other.read(2047 * 512), "GRUB's core image"
    parts = {part.number: part for part in done.layout.partitions}
    for number, wanted in ((5, expected), (1, expected_boot)):
        part = parts[number]
        check = ["e2fsck", "-f", "-n", f"{raw}?offset={part.start << 20}"]
        checked = subprocess.run(check, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        with systems.mounted(raw, part.start, part.size, mountpoint, "ro") as found:
            assert systems.seen(found) == wanted
            assert 20 << 20 <= os.statvfs(found).f_bfree * os.statvfs(found).f_frsize < 60 << 20
            if number == 5:
                flags = subprocess.run(
                    ["lsattr", "-d", found / "srv/immutable"], check=True, capture_output=True, text=True
                ).stdout
                assert "i" in flags.split()[0]
    assert inspection.inspect(tmp_path / "small.qcow2", tmp_path, "tcg").layout == done.layout


def test_gpt_with_bios_boot_esp_and_lvm_free_root_keeps_what_both_firmwares_start(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source.raw", tmp_path / "mounted"
    # As cloud images have it: numbers that are not in the disk's order.
    systems.disk(
        source,
        1500,
        "gpt",
        [
            Made(3, 3, "21686148-6449-6E6F-744E-656564454649", (), 14),
            Made(
                6,
                124,
                "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
                ("mkfs.vfat", "-F", "32", "-i", "CAFEBABE"),
                15,
            ),
            Made(130, 1300, "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", ("mkfs.ext4", "-U", ROOT), 1),
        ],
    )
    systems.grub(source, 3 * 2048)
    with systems.mounted(source, 130, 1300, mountpoint) as root:
        systems.system(root)
        systems.fstab(
            root,
            [
                f"PARTUUID={table(source)[1][3]} / ext4 defaults 0 1",
                "UUID=CAFE-BABE /boot/efi vfat umask=0077 0 1",
            ],
        )
        expected = systems.seen(root)
    fill_esp(source, 6 << 20, tmp_path)
    expected_esp = esp_of(source, 6 << 20)
    done = small(source, tmp_path / "small.qcow2")
    assert done.found.firmware == "both"
    raw = raw_of(tmp_path / "small.qcow2")
    old, new = table(source), table(raw)
    assert {number: part[2:] for number, part in new.items()} == {
        number: part[2:] for number, part in old.items()
    }
    parts = {part.number: part for part in done.layout.partitions}
    assert esp_of(raw, parts[15].start << 20) == expected_esp
    with systems.mounted(raw, parts[1].start, parts[1].size, mountpoint, "ro") as root:
        assert systems.seen(root) == expected
    probe = [
        "blkid",
        "--probe",
        "-O",
        str(parts[15].start << 20),
        "-S",
        str(parts[15].size << 20),
        "-o",
        "export",
    ]
    said = subprocess.run([*probe, raw], check=True, capture_output=True, text=True).stdout
    assert "UUID=CAFE-BABE" in said and "VERSION=FAT32" in said


def hostile_disk(source: Path, make: tuple[str, ...], kind: str, mountpoint: Path, attribute: int) -> Path:
    """A UEFI disk of 3 GiB with one file system for everything, and a hostile directory on it."""
    systems.disk(
        source,
        3000,
        "gpt",
        [
            Made(1, 40, ESP_TYPE, ("mkfs.vfat", "-i", "CAFEBABE"), 1),
            Made(41, 2900, "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", make, 2),
        ],
    )
    fill_esp(source, 1 << 20, mountpoint.parent)
    with systems.mounted(source, 41, 2900, mountpoint) as top:
        root = top
        if kind == "btrfs":
            for name in ("root", "home"):
                subprocess.run(["btrfs", "-q", "subvolume", "create", top / name], check=True)
            root = top / "root"
            (top / "home/someone").write_text("at home")
        systems.system(root)
        systems.hostile(root / "srv", attribute)
        systems.immutable(root / "srv")
        (root / "var").mkdir()
        (root / "var/random").write_bytes(os.urandom(100 << 20))
        (root / "home").mkdir()
        lines = ["UUID=CAFE-BABE /boot/efi vfat umask=0077 0 1"]
        if kind == "btrfs":
            lines += [
                f"UUID={ROOT} {place} btrfs subvol={name},compress=zstd:1 0 0"
                for place, name in (("/", "root"), ("/home", "home"))
            ]
        else:
            lines += [f"UUID={ROOT} / {kind} defaults 0 0"]
        systems.fstab(root, lines)
    return source


MAKERS = {
    # As an old system has it: its own kernel knows nothing of later features.
    "xfs": ("mkfs.xfs", "-q", "-L", "top", "-m", f"uuid={ROOT},reflink=0,bigtime=0,inobtcount=0"),
    "btrfs": ("mkfs.btrfs", "-q", "-L", "top", "-U", ROOT),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_needs_a_kernel_is_as_exact(kind: str, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mounted"
    attribute = {"xfs": 60 << 10, "btrfs": 12 << 10}[kind]
    source = hostile_disk(tmp_path / "source.raw", MAKERS[kind], kind, mountpoint, attribute)
    with systems.mounted(source, 41, 2900, mountpoint, "ro") as top:
        expected = systems.seen(top)
    before = digest(source)
    done = small(source, tmp_path / "small.qcow2")
    assert digest(source) == before
    # A btrfs gives its chunks back as a whole; how many it can do without depends on the kernel.
    assert done.after < {"xfs": 700, "btrfs": 1200}[kind] << 20
    raw = raw_of(tmp_path / "small.qcow2")
    part = done.layout.partitions[1]
    with systems.loop(raw, part.start, part.size) as device:
        said = subprocess.run(["blkid", "-p", "-o", "export", device], capture_output=True, text=True).stdout
        assert f"UUID={ROOT}" in said and "LABEL=top" in said
        check = {"xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}[kind]
        checked = subprocess.run([*check, device], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    with systems.mounted(raw, part.start, part.size, mountpoint, "ro") as top:
        assert systems.seen(top) == expected
        free = os.statvfs(top).f_bfree * os.statvfs(top).f_frsize
        assert free >= 18 << 20
        flags = subprocess.run(
            ["lsattr", "-d", *top.glob("**/srv/immutable")], check=True, capture_output=True, text=True
        )
        assert "i" in flags.stdout.split()[0]
        if kind == "xfs":
            info = subprocess.run(["xfs_info", top], check=True, capture_output=True, text=True).stdout
            assert "reflink=0" in info and "bigtime=0" in info and "ftype=1" in info
    assert esp_of(raw, done.layout.partitions[0].start << 20) == esp_of(source, 1 << 20)


def lvm_said(raw: Path, start: int, size: int, *command: str) -> str:
    """What a command of LVM's own says of a physical volume on a disk, without device-mapper."""
    with systems.loop(raw, start, size) as device:
        filtered = f'devices{{filter=["a|^{device}$|","r|.*|"]}}'
        argv = ["lvm", command[0], "--driverloaded", "n", "--config", filtered, *command[1:]]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_a_volume_group_keeps_its_names_and_uuids(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source.raw", tmp_path / "mounted"
    storage = Storage(
        (Volume("pv.1", "lvmpv", 1500, 1, grow=True),),
        (VolumeGroup("vg-disk", ("pv.1",), 2),),
        (
            Volume("/", "ext4", 900, 3, name="root", group="vg-disk"),
            Volume("/home", "ext4", 300, 4, name="home-1", group="vg-disk", options="nodev"),
            Volume("swap", "swap", 100, 5, name="swap", group="vg-disk"),
        ),
    )
    planned = layout.plan(storage, "bios", 1600, "msdos", "seed", tmp_path)
    with source.open("wb") as file:
        file.truncate(1600 << 20)
    native.write_table(planned, source)
    lvm.write(planned, planned.groups[0], source, 0)
    systems.grub(source)
    expected = {}
    for volume in planned.logical:
        ((offset, size),) = lvm.pieces(planned, volume)
        make = {"ext4": ["mkfs.ext4", "-q", "-U"], "swap": ["mkswap", "-U"]}[volume.holds.kind]
        with systems.loop(source, offset >> 20, size >> 20) as device:
            subprocess.run([*make, volume.holds.uuid, device], check=True, capture_output=True)
        if volume.holds.kind == "ext4":
            with systems.mounted(source, offset >> 20, size >> 20, mountpoint) as top:
                if volume.name == "root":
                    systems.system(top)
                    (top / "home").mkdir()
                    systems.fstab(top, layout.fstab(planned).splitlines())
                (top / volume.name).write_bytes(os.urandom(30 << 20))
                expected[volume.name] = systems.seen(top)
    done = small(source, tmp_path / "small.qcow2")
    assert done.found.layout == planned
    assert done.after < 250 << 20
    raw = raw_of(tmp_path / "small.qcow2")
    for volume in done.layout.logical:
        ((offset, size),) = lvm.pieces(done.layout, volume)
        if volume.holds.kind == "ext4":
            with systems.mounted(raw, offset >> 20, size >> 20, mountpoint, "ro") as top:
                assert systems.seen(top) == expected[volume.name]
    commands = (
        ("pvs", "--noheadings", "-o", "pv_uuid,vg_name"),
        ("vgs", "--noheadings", "-o", "vg_uuid,vg_name,vg_extent_size,lv_count"),
        ("lvs", "--noheadings", "-o", "lv_uuid,lv_name,vg_name"),
    )
    was, now = planned.partitions[0], done.layout.partitions[0]
    for command in commands:
        said = lvm_said(raw, now.start, now.size, *command)
        assert said == lvm_said(source, was.start, was.size, *command)
        assert said.strip()
