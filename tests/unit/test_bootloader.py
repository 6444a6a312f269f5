"""GRUB from outside: the menu's text, what goes into the tree, and how the images find each other."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.conftest import FakeCommand
from vdibuild.disk import bootloader
from vdibuild.disk.layout import Layout, plan
from vdibuild.errors import HostError, VdibuildError
from vdibuild.families import BootFiles, Kernel
from vdibuild.recipe import Storage, Volume, VolumeGroup
from vdibuild.tree import Tree

ROOT = Volume("/", "ext4", 1000, 1, grow=True)
KERNELS = [
    Kernel("6.12.1-amd64", "/boot/vmlinuz-6.12.1-amd64", "/boot/initrd.img-6.12.1-amd64"),
    Kernel("6.1.0-amd64", "/boot/vmlinuz-6.1.0-amd64", "/boot/initrd.img-6.1.0-amd64"),
]
BIOS = BootFiles("/boot/grub", "/usr/lib/grub/i386-pc", "", {})
EFI = BootFiles("/boot/grub", "", "/usr/lib/grub/x86_64-efi", {})

MENU = """\
# Written by vdibuild. All that it uses is built into GRUB's core image: nothing has to be loaded to show it.
set default=0
set timeout=3
# Without a serial port the machine's own screen is enough; a graphical terminal would need a VGA device.
if serial --unit=0 --speed=115200; then
  terminal_input console serial
  terminal_output console serial
fi
search --no-floppy --fs-uuid --set=root BOOT

menuentry 'Debian'\\''s own, with Linux 6.12.1-amd64' --id linux-6.12.1-amd64 {
  echo 'Loading Linux 6.12.1-amd64 ...'
  linux /vmlinuz-6.12.1-amd64 root=UUID=ROOT ro quiet 'dyndbg=file a.c +p; b' console=ttyS0
  initrd /initrd.img-6.12.1-amd64
}

menuentry 'Debian'\\''s own, with Linux 6.1.0-amd64' --id linux-6.1.0-amd64 {
  echo 'Loading Linux 6.1.0-amd64 ...'
  linux /vmlinuz-6.1.0-amd64 root=UUID=ROOT ro quiet 'dyndbg=file a.c +p; b' console=ttyS0
  initrd /initrd.img-6.1.0-amd64
}
"""


def planned(*partitions: Volume, firmware: str = "bios", table: str = "msdos") -> Layout:
    return plan(Storage(partitions), firmware, 2048, table, "seed", Path("x.ks"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree with modules, but without a grub-mkimage of its own."""
    (tmp_path / "tree").mkdir()
    made = Tree(tmp_path / "tree")
    for platform in ("i386-pc", "x86_64-efi"):
        made.write(f"/usr/lib/grub/{platform}/ext2.mod", platform)
        made.write(f"/usr/lib/grub/{platform}/moddep.lst", platform)
    made.write("/usr/lib/grub/i386-pc/boot.img", "boot")
    return made


def test_menu_names_paths_as_grub_sees_them() -> None:
    found = planned(Volume("/boot", "ext4", 256, 2), ROOT)
    text = bootloader.menu(
        found,
        KERNELS,
        'quiet dyndbg="file a.c +p; b" console=ttyS0',
        "Debian's own",
        timeout=3,
        site_directory=Path(),
    )
    assert text == MENU.replace("BOOT", found.boot.uuid).replace("ROOT", found.root.uuid)


def test_menu_without_a_boot_file_system_of_its_own() -> None:
    found = planned(ROOT)
    text = bootloader.menu(found, KERNELS[:1], "", "Debian", timeout=0, site_directory=Path())
    assert f"  linux /boot/vmlinuz-6.12.1-amd64 root=UUID={found.root.uuid} ro\n" in text


def test_images_find_each_other() -> None:
    core_image = bytes(range(256)) * 5
    first, core = bootloader.embed(b"\xaa" * 512, core_image, 2048)
    assert len(first) == 440
    assert struct.unpack_from("<Q", first, 0x5C) == (2048,)
    assert first[0x66:0x68] == b"\x90\x90"
    assert len(core) == 3 * 512
    assert struct.unpack_from("<QH", core, 0x1F4) == (2049, 2)
    # Nothing else has changed.
    assert core[:0x1F4] == core_image[:0x1F4]
    assert core[0x1FE:1280] == core_image[0x1FE:]


def test_core_image_goes_into_the_gap_or_the_bios_boot_partition(tree: Tree, tmp_path: Path) -> None:
    core_image = b"\x01" * 1024
    tree.write("/boot/grub/i386-pc/boot.img", "b" * 512)
    tree.write("/boot/grub/i386-pc/core.img", core_image.decode())
    bios_boot = Volume("biosboot", "biosboot", 1, 2)
    for layout, sector in (
        (planned(ROOT), 1),
        (planned(Volume("swap", "swap", 1, 3), bios_boot, ROOT, table="gpt"), 4096),
    ):
        disk = tmp_path / "disk"
        disk.write_bytes(b"\xff" * (4 << 20))
        bootloader.install(tree, layout, BIOS, disk)
        written = disk.read_bytes()
        assert struct.unpack_from("<Q", written, 0x5C) == (sector,)
        assert written[440:512] == b"\xff" * 72, "the partition table is not touched"
        assert written[sector * 512 : sector * 512 + 0x1F4] == core_image[:0x1F4]
        assert written[(sector + 2) * 512] == 0xFF


def test_core_image_that_is_too_large_is_refused(tree: Tree, tmp_path: Path) -> None:
    tree.write("/boot/grub/i386-pc/boot.img", "b" * 512)
    tree.write("/boot/grub/i386-pc/core.img", "c" * (1 << 20))
    with pytest.raises(VdibuildError, match="does not fit"):
        bootloader.install(tree, planned(ROOT), BIOS, tmp_path / "disk")


def test_core_image_is_made_of_what_the_disk_needs(tree: Tree, fake_command: FakeCommand) -> None:
    record = fake_command("grub-mkimage")
    layout = plan(
        Storage(
            (Volume("pv.1", "lvmpv", 1000, 1, grow=True),),
            (VolumeGroup("vg-a", ("pv.1",), 2),),
            (Volume("/", "xfs", 500, 3, name="root", group="vg-a"),),
        ),
        "bios",
        2048,
        "msdos",
        "seed",
        Path("x.ks"),
    )
    bootloader.prepare(tree, layout, BIOS)
    argv = record.read_text().split()
    assert argv[:2] == ["-O", "i386-pc"]
    assert argv[argv.index("-d") + 1] == f"{tree.root}/usr/lib/grub/i386-pc", "the target's modules"
    assert {"biosdisk", "part_msdos", "lvm", "xfs"} < set(argv)
    assert not {"ext2", "part_gpt"} & set(argv)
    assert tree.read("/boot/grub/i386-pc/load.cfg") == (
        f"search.fs_uuid {layout.root.uuid} root lvm/vg--a-root\nset prefix=($root)/boot/grub\n"
    )


def test_tree_gets_modules_and_an_empty_environment(tree: Tree, fake_command: FakeCommand) -> None:
    fake_command("grub-mkimage")
    bootloader.prepare(tree, planned(ROOT), BIOS)
    assert tree.read("/boot/grub/i386-pc/ext2.mod") == "i386-pc"
    assert tree.read("/boot/grub/i386-pc/moddep.lst") == "i386-pc"
    assert tree.read("/boot/grub/i386-pc/boot.img") == "boot"
    assert tree.path("/boot/grub/grubenv").read_bytes().ljust(1024, b"?") == (
        b"# GRUB Environment Block\n".ljust(1024, b"#")
    )


def test_own_efi_program_is_made_where_every_firmware_looks(tree: Tree, fake_command: FakeCommand) -> None:
    record = fake_command("grub-mkimage")
    layout = planned(Volume("/boot/efi", "vfat", 64, 1), ROOT, firmware="uefi")
    bootloader.prepare(tree, layout, EFI)
    argv = record.read_text().split()
    assert argv[argv.index("-o") + 1] == f"{tree.root}/boot/efi/EFI/BOOT/BOOTX64.EFI"
    assert tree.exists("/boot/grub/x86_64-efi/ext2.mod")


def test_signed_programs_are_taken_as_they_are(tree: Tree) -> None:
    tree.write("/usr/lib/shim/shimx64.efi.signed", "shim")
    tree.write("/usr/lib/grub/grubx64.efi.signed", "grub")
    signed = {
        "EFI/BOOT/BOOTX64.EFI": "/usr/lib/shim/shimx64.efi.signed",
        "EFI/debian/grubx64.efi": "/usr/lib/grub/grubx64.efi.signed",
    }
    boot_partition = Volume("/boot", "ext4", 256, 2)
    layout = planned(Volume("/boot/efi", "vfat", 64, 1), boot_partition, ROOT, firmware="uefi")
    bootloader.prepare(tree, layout, BootFiles("/boot/grub", "", "", signed))
    assert tree.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "shim"
    assert tree.read("/boot/efi/EFI/debian/grubx64.efi") == "grub"
    stub = f"search.fs_uuid {layout.boot.uuid} root\nset prefix=($root)/grub\nconfigfile $prefix/grub.cfg\n"
    assert tree.read("/boot/efi/EFI/BOOT/grub.cfg") == stub
    assert tree.read("/boot/efi/EFI/debian/grub.cfg") == stub


def test_link_in_the_tree_leads_nowhere_outside(
    tree: Tree, fake_command: FakeCommand, tmp_path: Path
) -> None:
    fake_command("grub-mkimage")
    outside = tmp_path / "outside"
    outside.write_text("host")
    tree.link("/boot/grub/grubenv", str(outside))
    bootloader.prepare(tree, planned(ROOT), BIOS)
    assert outside.read_text() == "host"


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_tree_without_grub_says_what_to_add(tree: Tree, firmware: str) -> None:
    layout = planned(Volume("/boot/efi", "vfat", 64, 1), ROOT, firmware=firmware)
    with pytest.raises(VdibuildError, match="no GRUB for") as caught:
        bootloader.prepare(tree, layout, BootFiles("/boot/grub", "", "", {}))
    assert "%packages" in caught.value.hint


def test_no_mkimage_anywhere(tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="grub-mkimage"):
        bootloader.prepare(tree, planned(ROOT), BIOS)
