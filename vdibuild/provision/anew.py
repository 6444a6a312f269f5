"""A system on another disk than it was made for: new file systems, and the boot menu that names them."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path

from vdibuild import progress
from vdibuild.disk import bootloader, layout
from vdibuild.disk.layout import Layout
from vdibuild.families import Family
from vdibuild.recipe import Bootloader, Recipe, Storage, Volume
from vdibuild.tree import Tree

_ESP = 64  # MiB
_TIMEOUT_SECONDS = 1
_DEFAULTS = "/etc/default/grub"
_OF_THE_DISK = ("root", "ro", "rw", "resume", "rd.lvm.lv", "rd.lvm.vg", "rd.luks.uuid", "rootflags")
"""Arguments of the kernel that say where its file systems were."""


@dataclass(frozen=True)
class Disk:
    """A disk with one file system, and swap. filesystem: of /. swap: MiB, 0 for none."""

    filesystem: str
    swap: int

    def plan(self, firmware: str, size: int) -> Layout:
        """Lay a disk of `size` MiB out; every machine's file systems have UUIDs of their own.

        Raises InputError when it is too small.
        """
        volumes = [
            Volume("/boot/efi", "vfat", _ESP, 0)
            if firmware == "uefi"
            else Volume("biosboot", "biosboot", 1, 0),
            *([Volume("swap", "swap", self.swap, 0)] if self.swap else []),
            # Last, so that it can grow.
            Volume("/", self.filesystem, 1, 0, grow=True),
        ]
        storage = Storage(partitions=tuple(volumes))
        return layout.plan(storage, firmware, size, "gpt", secrets.token_hex(), Path("the machine's disk"))


def move(tree: Tree, family: Family, planned: Layout, site_directory: Path) -> None:
    """Let an unpacked system boot from another disk: fstab, boot menu, initramfs and boot loader.

    site_directory: where templates are looked for first. Raises VdibuildError for what the system lacks.
    """
    with progress.step("make it boot from the new disk"):
        arguments = " ".join(shlex.quote(word) for word in kernel_arguments(tree))
        recipe = Recipe("", tree.root, bootloader=Bootloader(append=arguments, timeout=_TIMEOUT_SECONDS))
        family.prepare_boot(tree, recipe, planned, site_directory)
        bootloader.prepare(tree, planned, family.boot_files(tree))


def kernel_arguments(tree: Tree) -> list[str]:
    """The kernel's arguments that the system's own GRUB would use, without those of its old disk."""
    if not tree.exists(_DEFAULTS):
        return []
    values: dict[str, str] = {}
    for line in tree.read(_DEFAULTS).splitlines():
        name, sign, value = line.strip().partition("=")
        if sign and name in ("GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT"):
            values[name] = "".join(shlex.split(value, comments=True))
    words = shlex.split(" ".join(values.values()))
    return [word for word in words if word.partition("=")[0] not in _OF_THE_DISK]
