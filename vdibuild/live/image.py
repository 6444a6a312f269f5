"""From a finished tree to a bootable live ISO.

    tree -> prepare: initramfs and GRUB, in its /boot/live -> create: squashfs of all but /boot -> ISO

What the ISO holds: kernel, initramfs and GRUB (see grub.py) where the family has them, /LiveOS/squashfs.img,
/LiveOS/SHA256SUMS of all these, and /.disk/info, by which Debian's signed GRUB knows its medium.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vdibuild import hashing, progress
from vdibuild.families import Family
from vdibuild.live import INITRAMFS, ISO, KERNEL, grub, initramfs, iso, squashfs, verity
from vdibuild.live.initramfs import Contents
from vdibuild.live.squashfs import Compression
from vdibuild.live.verity import Verity
from vdibuild.output import unfinished
from vdibuild.tree import Tree

_SQUASHFS = "LiveOS/squashfs.img"
_DIGESTS = "LiveOS/SHA256SUMS"


@dataclass(frozen=True)
class Settings:
    """How a live system is made and started.

    label: the ISO's, which the system finds its medium by: unguessable, or a stick of that name could take
    the medium's place. title: its entry in the boot menu. arguments: the kernel's, besides those that a live
    system needs. timeout: seconds the menu is shown. closed: see grub.menu. left_out: see squashfs.create.
    verified: every read of the system is checked (see verity.py); contents must have the dracut module
    vdibuild-check then. settings: the files of the partition KIOSKCFG, by name; there is no such partition
    without them.
    """

    label: str
    title: str
    arguments: str = ""
    timeout: int = 0
    closed: bool = False
    left_out: tuple[str, ...] = ()
    verified: bool = False
    contents: Contents = field(default_factory=Contents)
    compression: Compression = field(default_factory=Compression)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Live:
    """A live system. arguments: the kernel's, for whoever boots it without the ISO's GRUB."""

    iso: Path
    kernel: Path
    initramfs: Path
    arguments: str


def prepare(tree: Tree, family: Family, settings: Settings, epoch: int) -> None:
    """Put into a customised tree what starts it as a live system: initramfs and GRUB, in /boot/live.

    epoch: the latest time in it, seconds since 1970; SOURCE_DATE_EPOCH should be the same. Raises
    VdibuildError when the tree lacks what a live system needs.
    """
    kernel = family.kernels(tree)[0]
    tree.make_directory(grub.DIRECTORY)
    initramfs.make(tree, kernel.version, settings.contents, f"{grub.DIRECTORY}/{INITRAMFS}")
    with progress.step("boot loader"):
        grub.prepare(tree, family.boot_files(tree), settings.label, epoch)


def create(
    tree: Tree, family: Family, settings: Settings, epoch: int, directory: Path, site_directory: Path
) -> Live:
    """Make a live ISO of a prepared tree, which is only read, and kernel and initramfs beside the ISO.

    epoch: as for `prepare`. directory: gets the files. site_directory: where templates are looked for
    first. Raises HostError when the disk is full.
    """
    kernel = family.kernels(tree)[0]
    medium = family.boot_files(tree).medium
    made = {kernel.image: directory / KERNEL, f"{grub.DIRECTORY}/{INITRAMFS}": directory / INITRAMFS}
    for source, target in made.items():
        with unfinished(target):
            shutil.copyfile(tree.path(source), target)
    with tempfile.TemporaryDirectory(prefix=".live-", dir=directory) as private:
        work = Path(private)
        with progress.step("squashfs"):
            squashfs.create(tree, work / "squashfs.img", settings.compression, settings.left_out)
            hashed = verity.append(work / "squashfs.img", settings.label) if settings.verified else None
        arguments = kernel_arguments(tree, settings, hashed)
        live = Live(directory / ISO, directory / KERNEL, directory / INITRAMFS, arguments)
        menu, info = work / "grub.cfg", work / "info"
        menu.write_text(
            grub.menu(settings.title, arguments, settings.timeout, site_directory, settings.closed, medium)
        )
        info.write_text(f"{settings.title}\n")
        programs = grub.programs(tree)
        card = work / "settings.img" if settings.settings else None
        if card:
            texts = {name: text.encode() for name, text in settings.settings.items()}
            grub.write_fat(card, iso.SETTINGS, texts, epoch)
        files = {
            "/.disk/info": info,
            f"{medium.menu}/grub.cfg": menu,
            medium.kernel: live.kernel,
            medium.initramfs: live.initramfs,
            f"/{_SQUASHFS}": work / "squashfs.img",
        }
        files |= {f"/{place}": file for place, file in programs.files.items()}
        # As sha256sum reads them, from the medium's root directory.
        sums = work / "SHA256SUMS"
        sums.write_text("".join(f"{hashing.of_file(file)}  {name[1:]}\n" for name, file in files.items()))
        content = iso.Content(
            label=settings.label,
            files=files | {f"/{_DIGESTS}": sums},
            bios=programs.bios,
            hybrid=programs.hybrid,
            esp=programs.esp,
            settings=card,
            bios_place=medium.bios,
            esp_place=medium.esp,
        )
        iso.write(content, live.iso, epoch)
    return live


def kernel_arguments(tree: Tree, settings: Settings, hashed: Verity | None = None) -> str:
    """The kernel's arguments: those by which dracut finds and mounts the system, and the caller's.

    hashed: the system's squashfs has these hashes, and is only read through them.
    """
    own = [
        f"root=live:CDLABEL={settings.label}",
        "rd.live.image",
        "rd.live.dir=LiveOS",
        *(hashed.arguments if hashed else ("rd.live.squashimg=squashfs.img",)),
        initramfs.overlay_argument(tree),
        # What fails has nobody to help it: no shell, a new start.
        *("rd.shell=0", "rd.emergency=reboot", "panic=30"),
        # All that is written is in memory, without swap; for huge pages Linux keeps some 100 MiB of it free.
        "transparent_hugepage=never",
    ]
    return " ".join([*own, *settings.arguments.split()])
