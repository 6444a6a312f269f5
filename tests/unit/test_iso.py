"""ISOs of a few small files: what is refused, what is written, and what other tools read in it.

The oracles are xorriso, isoinfo, sgdisk, blkid, 7z, mtools: none of them wrote any of it.
"""

from __future__ import annotations

import re
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pycdlib.headervd
import pytest

from vdibuild.errors import HostError, VdibuildError
from vdibuild.live import grub, iso
from vdibuild.live.iso import Content

EPOCH = 1_763_000_000  # 2025-11-13 02:13:20 UTC
MODULES = Path("/usr/lib/grub/i386-pc")
FILES = {
    "/.disk/info": b"a live system\n",
    "/LiveOS/squashfs.img": bytes(range(256)) * 20_000,
    "/boot/grub/grub.cfg": b"set timeout=0\n",
    "/boot/a name.with-signs.txt": b"x",
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """All that an ISO can have; GRUB is this host's."""
    place = tmp_path_factory.mktemp("content")
    files = {}
    for number, (name, data) in enumerate(FILES.items()):
        files[name] = place / str(number)
        files[name].write_bytes(data)
    core = place / "eltorito.img"
    subprocess.run(
        ["grub-mkimage", "-O", "i386-pc-eltorito", "-p", "/boot/grub", "-o", core, "biosdisk", "iso9660"],
        check=True,
    )
    grub.write_fat(place / "efi.img", "ESP", {"EFI/BOOT/BOOTX64.EFI": bytes(500_000)}, EPOCH)
    grub.write_fat(place / "settings.img", iso.SETTINGS, {"client.conf": b"server_ip=192.0.2.1\n"}, EPOCH)
    return Content(
        label="KIOSK_7Q2ABCDEFG",
        files=files,
        bios=core,
        hybrid=MODULES / "boot_hybrid.img",
        esp=place / "efi.img",
        settings=place / "settings.img",
    )


@pytest.fixture(scope="module")
def written(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("iso") / "image.iso"
    iso.write(content, output, EPOCH)
    return output


def say(*argv: str | Path) -> str:
    """What a command prints on either stream; it has to succeed."""
    ended = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


class TestRead:
    """By tools that did not write it."""

    def test_xorriso_finds_both_boot_images_patched_as_grub_wants_them(self, written: Path) -> None:
        said = say("xorriso", "-indev", written, "-report_el_torito", "plain")
        assert re.search(r"boot img : +1 +BIOS +y +none +0x0000 +0x00 +4 ", said), said
        assert re.search(r"boot img : +2 +UEFI +y +none ", said)
        assert re.search(r"img opts : +1 +boot-info-table grub2-boot-info", said)
        assert "/boot/grub/efi.img" in said
        assert "Volume id    : 'KIOSK_7Q2ABCDEFG'" in said

    def test_xorriso_finds_a_bootable_disk(self, written: Path) -> None:
        said = say("xorriso", "-indev", written, "-report_system_area", "plain")
        assert re.search(r"System area summary: MBR protective-msdos-label grub2-mbr .*GPT", said), said
        assert re.search(r"MBR partition +: +1 +0x00 +0xee +1 ", said)
        assert re.search(r"MBR partition +: +2 +0x80 +0x00 +0 +1\n", said)

    def test_sgdisk_finds_no_fault_in_the_partition_table(self, written: Path) -> None:
        said = say("sgdisk", "--verify", "--print", written)
        assert "No problems found" in said
        assert re.search(r"^ +1 +\d+ +\d+ .* EF00 +ESP$", said, re.MULTILINE)
        assert re.search(r"^ +2 +\d+ +\d+ .* 0700 +KIOSKCFG$", said, re.MULTILINE)

    def test_no_partition_covers_the_iso_itself(self, written: Path) -> None:
        said = say("sgdisk", "--print", written)
        blocks = int(re.findall(r"Volume size is: (\d+)", say("isoinfo", "-d", "-i", written))[0])
        starts = [int(start) for start in re.findall(r"^ +\d +(\d+) ", said, re.MULTILINE)]
        assert min(starts) >= blocks * 4
        assert [start % 2048 for start in starts] == [0, 0]

    def test_what_is_on_the_partitions(self, written: Path, tmp_path: Path) -> None:
        said = say("sgdisk", "--print", written)
        esp, settings = (int(start) * 512 for start in re.findall(r"^ +\d +(\d+) ", said, re.MULTILINE))
        assert say("mtype", "-i", f"{written}@@{settings}", "::/client.conf") == "server_ip=192.0.2.1\n"
        program = tmp_path / "program"
        say("mcopy", "-i", f"{written}@@{esp}", "::/EFI/BOOT/BOOTX64.EFI", program)
        assert program.read_bytes() == bytes(500_000)

    def test_blkid_finds_the_label(self, written: Path) -> None:
        said = say("blkid", "--probe", written)
        assert 'LABEL="KIOSK_7Q2ABCDEFG"' in said
        assert 'TYPE="iso9660"' in said

    @pytest.mark.parametrize("view", ["-R", "-J"])
    def test_isoinfo_reads_the_files_under_their_names(self, written: Path, view: str) -> None:
        names = say("isoinfo", view, "-f", "-i", written).splitlines()
        assert {*FILES, "/boot/boot.cat"} <= set(names)
        for name, data in FILES.items():
            read = subprocess.run(
                ["isoinfo", view, "-i", written, "-x", name], check=True, capture_output=True
            )
            assert read.stdout == data, name

    def test_7z_reads_every_byte(self, written: Path, tmp_path: Path) -> None:
        say("7z", "x", f"-o{tmp_path}", written)
        for name, data in FILES.items():
            assert (tmp_path / name.lstrip("/")).read_bytes() == data

    def test_bios_finds_the_core_image_by_its_own_block_lists(self, written: Path, content: Content) -> None:
        """Followed as cdboot.img and boot_hybrid.img do, without this project's arithmetic."""
        data = written.read_bytes()
        assert content.bios
        image = content.bios.read_bytes()
        start = data.index(image[64:2048]) - 64
        # From the boot sector: the sector of diskboot.img, which follows cdboot.img.
        hybrid = struct.unpack_from("<Q", data, 0x1B0)[0] * 512
        assert hybrid == start + 2048
        # From diskboot.img: the sector that follows it.
        rest = struct.unpack_from("<Q", data, hybrid + 0x1F4)[0] * 512
        assert rest == hybrid + 512
        assert data[rest : rest + 4096] == image[2048 + 512 :][:4096]
        # From the boot information table: itself, its length, its sum.
        block, length, total = struct.unpack_from("<III", data, start + 12)
        assert (block * 2048, length) == (start, len(image))
        padded = data[start + 64 : start + length] + bytes(-length % 4)
        assert total == sum(struct.unpack(f"<{len(padded) // 4}I", padded)) & 0xFFFFFFFF

    def test_everything_has_the_one_time(self, written: Path) -> None:
        listed = say("7z", "l", written)
        assert set(re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) [D.]", listed, re.MULTILINE)) == {
            "2025-11-13 02:13:20"
        }


def test_the_same_content_gives_the_same_bytes(
    content: Content, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    iso.write(content, tmp_path / "again.iso", EPOCH)
    assert (tmp_path / "again.iso").read_bytes() == written.read_bytes()
    iso.write(content, tmp_path / "later.iso", EPOCH + 86400)
    assert (tmp_path / "later.iso").read_bytes() != written.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, (1 << 20) - 17_000, (1 << 20) - 1, 1 << 20])
def test_the_end_of_the_last_file_is_whole_whatever_its_size(
    content: Content, tmp_path: Path, size: int
) -> None:
    last = tmp_path / "last"
    last.write_bytes(b"\xa5" * size)
    iso.write(replace(content, files={"/zz.bin": last}, settings=None), tmp_path / "o.iso", EPOCH)
    say("7z", "x", f"-o{tmp_path / 'out'}", tmp_path / "o.iso")
    assert (tmp_path / "out" / "zz.bin").read_bytes() == b"\xa5" * size
    assert "No problems found" in say("sgdisk", "--verify", tmp_path / "o.iso")


@pytest.mark.parametrize(
    ("without", "entries"),
    [
        ({"bios": None, "hybrid": None}, ["UEFI"]),
        ({"esp": None}, ["BIOS"]),
        ({"settings": None}, ["BIOS", "UEFI"]),
    ],
)
def test_for_one_firmware_only(
    content: Content, tmp_path: Path, without: dict[str, None], entries: list[str]
) -> None:
    output = tmp_path / "o.iso"
    iso.write(replace(content, **without), output, EPOCH)  # type: ignore[arg-type]
    said = say("xorriso", "-indev", output, "-report_el_torito", "plain")
    assert re.findall(r"boot img : +\d +(\w+)", said) == entries
    assert "No problems found" in say("sgdisk", "--verify", output)


@pytest.mark.parametrize("label", ["", "KIOSK_20261121_AB", "kiosk", "KIOSK 1", "KIÖSK", "A\n", "../A"])
def test_a_label_that_no_iso_can_have(content: Content, tmp_path: Path, label: str) -> None:
    with pytest.raises(VdibuildError, match="cannot be the label") as caught:
        iso.write(replace(content, label=label), tmp_path / "o.iso", EPOCH)
    assert "1 to 16 capitals" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda content, missing: replace(content, files={"/a": missing}),
        lambda content, missing: replace(content, bios=missing),
        lambda content, missing: replace(content, esp=missing),
        lambda content, missing: replace(content, settings=missing),
    ],
)
def test_a_missing_file_is_named(
    content: Content, tmp_path: Path, harm: Callable[[Content, Path], Content]
) -> None:
    missing = tmp_path / "missing.img"
    with pytest.raises(VdibuildError, match=r"missing\.img, which belongs into the ISO, is not there"):
        iso.write(harm(content, missing), tmp_path / "o.iso", EPOCH)
    assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_name(content: Content, tmp_path: Path) -> None:
    files = {"/boot/a-b": MODULES / "boot.img", "/boot/a+b": MODULES / "boot.img"}
    with pytest.raises(VdibuildError, match="/boot/a-b and /boot/a\\+b have the same name on an ISO"):
        iso.write(replace(content, files=files), tmp_path / "o.iso", EPOCH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/boot/" + "n" * 70, "relative"])
def test_a_path_that_no_iso_can_have(content: Content, tmp_path: Path, place: str) -> None:
    with pytest.raises(VdibuildError, match=f"{place} cannot be on an ISO"):
        iso.write(replace(content, files={place: MODULES / "boot.img"}), tmp_path / "o.iso", EPOCH)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_and_leaves_nothing(content: Content, tmp_path: Path) -> None:
    """With a limit on a file's size, which fails a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError, match="File too large"):
            iso.write(content, tmp_path / "o.iso", EPOCH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(content: Content, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this host has no /dev/full")
    # Opened and written like a file, it has no space left; unlinking the link leaves the device.
    (tmp_path / "o.iso").symlink_to("/dev/full")
    with pytest.raises(HostError, match=f"no space left in {tmp_path}"):
        iso.write(content, tmp_path / "o.iso", EPOCH)
    assert list(tmp_path.iterdir()) == []


def test_fat_images_are_reproducible_and_sound(tmp_path: Path) -> None:
    files = {"EFI/BOOT/BOOTX64.EFI": b"program", "EFI/debian/grub.cfg": b"menu", "top": bytes(3_000_000)}
    for name in ("one", "two"):
        grub.write_fat(tmp_path / name, "ESP", files, EPOCH)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    say("fsck.fat", "-n", tmp_path / "one")
    assert say("mtype", "-i", tmp_path / "one", "::/EFI/debian/grub.cfg") == "menu"


def test_pycdlib_gets_its_clock_back(content: Content, tmp_path: Path) -> None:
    iso.write(content, tmp_path / "o.iso", EPOCH)
    assert vars(pycdlib.headervd)["time"] is time
