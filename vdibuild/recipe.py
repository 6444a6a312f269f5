"""What a kickstart says, as typed values: the currency between the kickstart's parser and every builder.

Each value keeps the line of the rendered kickstart it came from, for errors. Sizes are in MiB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Repository:
    """A package repository. For Debian, name is the suite (`trixie-security`); for RPM any identifier."""

    name: str
    url: str
    line: int
    mirrorlist: bool = False
    metalink: bool = False


@dataclass(frozen=True)
class LiveImage:
    """A prepared file system, an archive or image of it, that is installed in place of packages.

    checksum: its SHA-256, or empty. proxy: what it is fetched through, or empty. verify: whether the
    server's certificate has to be valid.
    """

    url: str
    checksum: str
    line: int
    proxy: str = ""
    verify: bool = True


@dataclass(frozen=True)
class Password:
    """A password. hashed: in crypt(3) form, empty for none. locked: nobody can log in with it."""

    hashed: str
    locked: bool


@dataclass(frozen=True)
class User:
    """A user to create. groups: supplementary ones. uid, gid: None lets the family choose."""

    name: str
    password: Password
    line: int
    groups: tuple[str, ...] = ()
    gecos: str = ""
    home: str = ""
    shell: str = ""
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True)
class Group:
    """A group to create."""

    name: str
    line: int
    gid: int | None = None


@dataclass(frozen=True)
class SshKey:
    """A public key (one authorized_keys line) for a user."""

    user: str
    key: str
    line: int


@dataclass(frozen=True)
class NetworkInterface:
    """A network interface to configure.

    device: a kernel name, a MAC address, or `link` (the first with a carrier: any wired one).
    address, prefix: an IPv4 address and its prefix length, or None for DHCP.
    """

    device: str
    line: int
    address: str | None = None
    prefix: int | None = None
    gateway: str | None = None
    nameservers: tuple[str, ...] = ()
    ipv6: bool = True
    mtu: int | None = None


@dataclass(frozen=True)
class Script:
    """A %post section. chroot: runs inside the tree; otherwise on the host, with the tree's path in $ROOT.

    log: a path (inside the tree for chroot scripts) that gets what it prints, or empty.
    """

    text: str
    line: int
    chroot: bool = True
    interpreter: str = "/bin/sh"
    log: str = ""
    error_on_fail: bool = False


@dataclass(frozen=True)
class Packages:
    """The %packages section: package names, groups, and what to leave out (globs allowed there).

    translations: the languages (`nl`, `nl_NL`) whose translations of the packages' messages are installed;
    None for all.
    """

    names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    environment: str = ""
    excluded_names: tuple[str, ...] = ()
    excluded_groups: tuple[str, ...] = ()
    weak_dependencies: bool = False
    documentation: bool = True
    translations: tuple[str, ...] | None = None
    core: bool = True
    line: int = 0

    @property
    def catalogues(self) -> list[str]:
        """The names of the message catalogues for `translations`: with nl_NL goes nl."""
        return sorted(
            {part for name in self.translations or () for part in (name, re.split("[_@]", name)[0])}
        )


@dataclass(frozen=True)
class Volume:
    """A file system, swap area, physical volume or BIOS boot partition, on a partition or logical volume.

    mountpoint: a path, `swap`, `biosboot`, or `pv.NAME` for a physical volume.
    filesystem: ext4, xfs, btrfs, vfat (the EFI system partition), swap, lvmpv or biosboot.
    size: MiB; grow: takes what is left, up to maximum (MiB). name, group: for logical volumes only.
    """

    mountpoint: str
    filesystem: str
    size: int
    line: int
    grow: bool = False
    maximum: int | None = None
    label: str = ""
    options: str = ""
    name: str = ""
    group: str = ""


@dataclass(frozen=True)
class VolumeGroup:
    """A volume group on physical volumes (`pv.NAME`). extent: its extent size in MiB."""

    name: str
    physical: tuple[str, ...]
    line: int
    extent: int = 4


@dataclass(frozen=True)
class Storage:
    """How the disk is laid out. table: `gpt`, `msdos`, or empty for what the firmware suggests."""

    partitions: tuple[Volume, ...] = ()
    groups: tuple[VolumeGroup, ...] = ()
    logical: tuple[Volume, ...] = ()
    table: str = ""


@dataclass(frozen=True)
class Bootloader:
    """The boot loader. append: kernel arguments. timeout: seconds. install: False for location=none."""

    append: str = ""
    timeout: int = 1
    install: bool = True
    line: int = 0


@dataclass(frozen=True)
class Recipe:
    """A kickstart, validated. text: the rendered kickstart; source: the template it came from."""

    text: str
    source: Path
    url: Repository | None = None
    live_image: LiveImage | None = None
    repositories: tuple[Repository, ...] = ()
    language: str = ""
    keyboard: str = ""
    timezone: str = ""
    utc: bool = True
    root_password: Password = Password("", locked=True)
    users: tuple[User, ...] = ()
    groups: tuple[Group, ...] = ()
    ssh_keys: tuple[SshKey, ...] = ()
    hostname: str = ""
    interfaces: tuple[NetworkInterface, ...] = ()
    services_enabled: tuple[str, ...] = ()
    services_disabled: tuple[str, ...] = ()
    selinux: str = ""
    bootloader: Bootloader = field(default_factory=Bootloader)
    storage: Storage = field(default_factory=Storage)
    packages: Packages = field(default_factory=Packages)
    scripts: tuple[Script, ...] = ()


def package_line(recipe: Recipe, entry: str) -> int | None:
    """The line of the rendered kickstart on which %packages has this entry (`name`, `-name`, `@group`)."""
    inside = False
    for number, text in enumerate(recipe.text.splitlines(), start=1):
        word = text.split("#")[0].strip()
        if word.startswith("%"):
            inside = word.split()[0] == "%packages"
        elif inside and word == entry:
            return number
    return None
