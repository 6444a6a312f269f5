"""What differs between families of guests: one module each, all with this interface, and nowhere else."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vdibuild.disk.layout import Layout
from vdibuild.recipe import NetworkInterface, Recipe
from vdibuild.settings.images import System
from vdibuild.tree import Files, Tree


@dataclass(frozen=True)
class RepositoryState:
    """What a package repository offered when it was asked.

    digest: SHA-256 of its index (InRelease, repomd.xml). date: when that was made, seconds since 1970.
    """

    url: str
    digest: str
    date: int


@dataclass(frozen=True)
class InstalledPackage:
    """A package in a tree. source: the name of its source package; license: an SPDX expression or empty."""

    name: str
    version: str
    architecture: str
    source: str
    license: str = ""


@dataclass(frozen=True)
class Distribution:
    """Whose packages a tree has, in the words of package URLs (github.com/package-url/purl-spec).

    type: deb or rpm. namespace: the vendor, as os-release's ID says it: debian, fedora. release: its ID and
    VERSION_ID, such as debian-13.
    """

    type: str
    namespace: str
    release: str


@dataclass(frozen=True)
class Kernel:
    """A kernel in a tree; image and initramfs are paths of the tree."""

    version: str
    image: str
    initramfs: str


@dataclass(frozen=True)
class Medium:
    """Where a live medium keeps what starts it, as the family's own tools place it; paths of the ISO.

    kernel, initramfs; menu: the directory of grub.cfg; bios, esp: the images that El Torito names. programs:
    what is on the EFI system partition is among the ISO's files, too.
    """

    kernel: str = "/boot/vmlinuz"
    initramfs: str = "/boot/initrd.img"
    menu: str = "/boot/grub"
    bios: str = "/boot/grub/eltorito.img"
    esp: str = "/boot/grub/efi.img"
    programs: bool = False


@dataclass(frozen=True)
class BootFiles:
    """Where a tree keeps its boot loader; paths of the tree.

    grub_directory: where grub.cfg and the modules belong (/boot/grub, /boot/grub2).
    bios_modules, efi_modules: GRUB's module directories, empty where there are none.
    signed: the distribution's signed EFI programs, by their place on the EFI system partition
    (`EFI/BOOT/BOOTX64.EFI`); empty where an own GRUB image has to be made. live: the same for a live
    medium, whose GRUB looks for its menu on an ISO. medium: what such a medium looks like.
    """

    grub_directory: str
    bios_modules: str
    efi_modules: str
    signed: dict[str, str]
    live: dict[str, str] = field(default_factory=dict)
    medium: Medium = Medium()


class Family(Protocol):
    """A family of distributions."""

    name: str

    def mirrors(self, image: System) -> dict[str, str]:
        """Values for the kickstart's template: where packages come from, by role (`main`, `security`)."""

    def repository_states(self, recipe: Recipe, image: System) -> list[RepositoryState]:
        """Ask every repository of the recipe for its state.

        Raises HostError naming the repository that does not answer.
        """

    def bootstrap(self, recipe: Recipe, image: System, root: Path, downloads: Path) -> None:
        """Install the recipe's packages, and the image's own, into the new directory `root`.

        downloads: a directory that keeps packages between runs. Raises InputError naming the recipe's
        line for a package that does not exist, HostError for an unreachable repository.
        """

    def configure(self, tree: Tree, recipe: Recipe, image: System) -> None:
        """Apply the recipe's settings to the tree: language, users, network, services, …"""

    def prepare_boot(self, tree: Tree, recipe: Recipe, layout: Layout, site_directory: Path) -> None:
        """Write what the system needs to boot from `layout`: boot menu, kernel arguments, initramfs.

        site_directory: where templates are looked for first.
        """

    def reconnect(self, files: Files, interface: NetworkInterface, mac: str) -> None:
        """Configure the one network interface of a finished system, in the way it is served there.

        mac: the interface's address. Raises VdibuildError when nothing in the system configures networks.
        """

    def boot_files(self, tree: Tree) -> BootFiles:
        """Where the tree keeps its boot loader."""

    def kernels(self, tree: Tree) -> list[Kernel]:
        """The installed kernels, newest first. Raises InputError when there is none."""

    def installed(self, tree: Tree) -> list[InstalledPackage]:
        """The installed packages, sorted by name."""

    def distribution(self, tree: Tree) -> Distribution:
        """Where the tree's packages come from."""

    def seal(self, tree: Tree) -> None:
        """Remove the family's own marks of identity, logs and caches (what is common is in disk.seal)."""


def version_order(version: str) -> list[tuple[int, str]]:
    """A sort key for the versions of kernels, under which 6.12 comes after 6.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", version)]


def of(os_release: Mapping[str, str]) -> str | None:
    """The name of the family that a system belongs to, by its os-release; None for one that is not known."""
    names = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


_FAMILIES = {"debian": "debian", "ubuntu": "debian", "rhel": "redhat", "fedora": "redhat", "centos": "redhat"}


def get(name: str) -> Family:
    """The family of that name (see settings.images.Image.family)."""
    family: Family = importlib.import_module(f"vdibuild.families.{name}").family
    return family
