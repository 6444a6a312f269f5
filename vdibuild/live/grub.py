"""GRUB for an ISO: its menu, and the programs that BIOS and UEFI start from it.

    grub.cfg        the menu, one for both
    eltorito.img    GRUB for BIOS, in one piece
    efi.img         a FAT image with GRUB for UEFI: the distribution's signed one, where it has one

All of it is made from the tree's own GRUB; where it is on the ISO is the family's (families.Medium).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vdibuild import config_template, process
from vdibuild.disk import bootloader, mkfs
from vdibuild.disk.layout import FileSystem
from vdibuild.errors import VdibuildError
from vdibuild.families import BootFiles, Medium
from vdibuild.tree import Tree

_MIB = 1 << 20
_DEFAULT = Medium()

DIRECTORY = "/boot/live"
"""The tree's directory for what starts it as a live system."""

_BIOS, _HYBRID, _EFI, _ESP = "eltorito.img", "boot_hybrid.img", "BOOTX64.EFI", "efi.img"
_LOAD = "load.cfg"
_ESP_FILES = "esp"

_MODULES = (
    *("iso9660", "normal", "linux", "search", "search_label", "configfile", "echo", "test", "serial"),
    *("terminal", "ls", "cat", "minicmd", "reboot", "halt"),
)
_BIOS_MODULES = ("biosdisk",)
_EFI_MODULES = ("fat", "part_gpt", "part_msdos", "efi_gop")
_SPARE = 256 << 10
"""Bytes of an EFI system partition for FAT's own tables, and for directories."""


@dataclass(frozen=True)
class Programs:
    """What firmware starts. bios: GRUB for El Torito; hybrid: GRUB's boot sector for such a medium as a
    disk; both None where the tree has no GRUB for BIOS. esp: the FAT image for UEFI, or None. files: what is
    in that, by its place, where the medium has these as files, too.
    """

    bios: Path | None
    hybrid: Path | None
    esp: Path | None
    files: Mapping[str, Path] = field(default_factory=dict)


def programs(tree: Tree) -> Programs:
    """What `prepare` has made."""
    made = [tree.path(f"{DIRECTORY}/{name}") for name in (_BIOS, _HYBRID, _ESP)]
    bios, hybrid, image = (path if path.is_file() else None for path in made)
    esp = tree.path(f"{DIRECTORY}/{_ESP_FILES}")
    files = {str(path.relative_to(esp)): path for path in sorted(esp.rglob("*")) if path.is_file()}
    return Programs(bios, hybrid, image, files)


def menu(
    title: str,
    arguments: str,
    timeout: int,
    site_directory: Path,
    closed: bool = False,
    medium: Medium = _DEFAULT,
) -> str:
    """The text of grub.cfg. arguments: the kernel's. timeout: seconds the menu is shown. medium: where the
    kernel is.

    closed: nobody can change an entry or use GRUB's shell, and there is one more entry, which has the medium
    checked. site_directory: where templates/live-grub.cfg.j2 is looked for first.
    """
    return config_template.render(
        "live-grub.cfg.j2",
        site_directory,
        title=bootloader.quoted(title),
        arguments=" ".join(bootloader.quoted(word) for word in arguments.split()),
        timeout=timeout,
        closed=closed,
        check_title=bootloader.quoted(f"{title}, its medium checked"),
        kernel=medium.kernel,
        initramfs=medium.initramfs,
    )


def prepare(tree: Tree, boot: BootFiles, label: str, epoch: int) -> None:
    """Make the programs that start from an ISO with that label, in the tree's /boot/live.

    epoch: the time of the files on the EFI system partition, seconds since 1970. Raises VdibuildError when
    the tree has no GRUB at all.
    """
    directory = tree.make_directory(DIRECTORY)
    if boot.bios_modules:
        # Without a device in it, the prefix means the medium that GRUB was started from.
        _mkimage(tree, "i386-pc-eltorito", boot, (*_BIOS_MODULES, *_MODULES), _BIOS)
        shutil.copyfile(tree.path(f"{boot.bios_modules}/boot_hybrid.img"), directory / _HYBRID)
    # On UEFI GRUB is started from the FAT image, and has to look for the ISO around it.
    stub = f"search.fs_label {label} root\nset prefix=($root){boot.medium.menu}\n"
    files: dict[str, bytes] = {}
    if boot.live:
        files = {place: tree.path(source).read_bytes() for place, source in boot.live.items()}
        # Fedora's signed GRUB reads this; Debian's looks for /.disk/info on all media.
        for beside in {str(PurePosixPath(place).parent) for place in boot.live}:
            files[f"{beside}/grub.cfg"] = f"{stub}configfile $prefix/grub.cfg\n".encode()
    elif boot.efi_modules:
        tree.write(f"{DIRECTORY}/{_LOAD}", stub)
        _mkimage(tree, "x86_64-efi", boot, (*_EFI_MODULES, *_MODULES), _EFI, _LOAD)
        files = {"EFI/BOOT/BOOTX64.EFI": (directory / _EFI).read_bytes()}
    if not boot.bios_modules and not files:
        raise VdibuildError(
            "the system has no GRUB to make an ISO with",
            "add to %packages: grub-pc-bin and grub-efi-amd64-bin (Debian), grub2-pc-modules and "
            "grub2-efi-x64-cdboot (Fedora, EL)",
        )
    if files:
        write_fat(directory / _ESP, "ESP", files, epoch)
    if boot.medium.programs:
        for place, content in files.items():
            target = directory / _ESP_FILES / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def write_fat(image: Path, label: str, files: Mapping[str, bytes], epoch: int) -> None:
    """Make a FAT image that is as large as its files ask for. files: content by path. epoch: their time."""
    # Each file, and each directory on the way to it, takes a cluster more than its bytes, at most.
    size = -(-(sum(map(len, files.values())) + _SPARE) // _MIB)
    with image.open("wb") as file:
        file.truncate(size * _MIB)
    identifier = f"{epoch & 0xFFFFFFFF:08X}"
    fs = FileSystem("vfat", f"{identifier[:4]}-{identifier[4:]}", "/", label)
    process.run(mkfs.vfat(fs, image, size))
    # FAT keeps local time.
    env = {"MTOOLSRC": "/dev/null", "TZ": "UTC", "SOURCE_DATE_EPOCH": str(epoch)}
    with tempfile.TemporaryDirectory(prefix=f".{image.name}-", dir=image.parent) as private:
        source = Path(private)
        for place, content in files.items():
            target = source / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        for entry in source.rglob("*"):
            os.utime(entry, (epoch, epoch))
        entries = sorted(str(entry) for entry in source.iterdir())
        process.run(["mcopy", "-i", str(image), "-s", "-m", "-Q", *entries, "::/"], env=env)


def _mkimage(
    tree: Tree, platform: str, boot: BootFiles, modules: tuple[str, ...], name: str, load: str = ""
) -> None:
    """Make a GRUB in one piece. load: a file of commands to begin with."""
    source = boot.efi_modules if load else boot.bios_modules
    paths = {"-d": source, "-o": f"{DIRECTORY}/{name}"}
    if load:
        paths["-c"] = f"{DIRECTORY}/{load}"
    bootloader.run_mkimage(tree, platform, paths, boot.medium.menu, modules)
