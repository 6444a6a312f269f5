"""Golden images, and how they are installed."""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vdibuild.settings.values import Mac, Name, Settings, Sha256, Size
from vdibuild.settings.windows import Windows

_OF_LINUX = (
    *("kickstart", "variables", "packages", "overlays", "authorized_keys", "playbook", "bundle"),
    *("mirror", "security_mirror", "components", "keyring"),
)
_LEAST = {"win10": (32 * 1024, 2048), "win11": (64 * 1024, 4096)}  # Microsoft's: disk and memory, MiB


class Disk(Settings):
    """The disk of an image."""

    size: Size = Field(default="4GiB", validate_default=True)
    """Size of the disk as a guest sees it, such as 8GiB."""
    layout: str = "plain-ext4"
    """Which partitions: the name of a file in kickstarts/layouts, without its ending."""
    table: Literal["gpt", "msdos"] = "gpt"
    """The partition table."""


class Network(Settings):
    """The network of a machine."""

    kind: Literal["user", "nat", "bridge"] = "user"
    """user: QEMU's own, which needs no set-up; nat: a network of libvirt; bridge: a bridge of this host."""
    name: str = "default"
    """The name of libvirt's network, or of the bridge."""
    address: IPv4Address | None = None
    """The machine's IPv4 address; its MAC address is made from it: 192.168.122.4 gives 52:54:c0:a8:7a:04."""
    mac: Mac | None = None
    """The machine's MAC address; by default made from the address, or by libvirt."""

    @property
    def hardware_address(self) -> str | None:
        """The MAC address: the given one, or 52:54 and the four bytes of the IPv4 address."""
        if self.mac or self.address is None:
            return self.mac
        return ":".join(["52", "54", *(f"{byte:02x}" for byte in self.address.packed)])


class Install(Settings):
    """How an installer is run in a guest."""

    location: str | None = None
    """The medium: an ISO by path (relative to the site file) or URL, or the URL of an installation tree."""
    sha256: Sha256 | None = None
    """SHA-256 of the ISO; needed where it is downloaded."""
    kernel: str | None = None
    """The installer's kernel: a path in the ISO or the tree where there is a location, else on this host."""
    initrd: str | None = None
    """The installer's initramfs, likewise."""
    arguments: list[str] = Field(default_factory=list)
    """More arguments for the installer's kernel, such as inst.sshd."""
    osinfo: str | None = None
    """The system's name for virt-install (`virt-install --osinfo list`); by default found on the medium."""
    pool: str | None = None
    """The libvirt storage pool (dir or logical) for the disk; by default a file among the build's own."""
    network: Network = Field(default_factory=Network)
    """The network of the guest."""
    memory: Size = Field(default="3GiB", validate_default=True)
    """Memory of the guest that installs; Fedora and EL want 3GiB."""
    cpus: Annotated[int, Field(gt=0)] = 2
    """Processors of the guest that installs; one where it is emulated."""
    deadline_seconds: Annotated[int, Field(gt=0)] = 7200
    """How long an installation may take."""
    silence_seconds: Annotated[int, Field(gt=0)] = 900
    """How long the installer may say nothing, neither on its console nor in its log."""
    keep: bool = False
    """Leave the machine and its disk defined in libvirt after the installation; needs a pool."""
    autostart: bool = False
    """Start the machine that is kept whenever its host starts."""

    @model_validator(mode="after")
    def _consistent(self) -> Install:
        if (self.kernel is None) != (self.initrd is None):
            raise ValueError("kernel and initrd go together")
        if self.location and not self.sha256 and downloaded(self.location):
            raise ValueError("an ISO that is downloaded needs its sha256")
        if self.keep and not self.pool:
            raise ValueError("keep needs a pool for the disk to stay in")
        if self.autostart and not self.keep:
            raise ValueError("autostart is for a machine that is kept")
        return self


def downloaded(location: str) -> bool:
    """Whether an installer's location is an ISO that has to be downloaded (a tree is read in place)."""
    return bool(re.match(r"https?://", location)) and location.partition("?")[0].endswith(".iso")


class System(Settings):
    """A system that is made of packages: what golden images and live systems have in common."""

    family: Literal["debian", "redhat", "windows"]
    """The family of systems: debian (also Ubuntu), redhat (Fedora, EL), or windows."""
    release: str
    """The release: a Debian or Ubuntu code name such as trixie; fedora43, el9, el10; win10 or win11."""
    kickstart: str = ""
    """The recipe: a file in kickstarts/. Windows has none."""
    variables: dict[str, str | int | bool | list[str]] = Field(default_factory=dict)
    """Values for the recipe's own variables."""
    packages: list[str] = Field(default_factory=list)
    """Packages to install in addition to the recipe's."""
    overlays: list[str] = Field(default_factory=list)
    """File trees to lay over the system, in this order: directories in overlays/."""
    authorized_keys: list[str] = Field(default_factory=list)
    """Public SSH keys that may log in as root."""
    playbook: Path | None = None
    """An Ansible playbook that configures the system; relative to the site file."""
    mirror: str | None = None
    """Where packages come from; by default what this host's own package manager uses. A Debian archive's URL;
    for redhat the directory that holds `releases` and `updates` (Fedora), `BaseOS` and `AppStream` (EL)."""
    security_mirror: str | None = None
    """Where Debian's security updates come from; by default this host's, else none."""
    components: list[str] = Field(default_factory=lambda: ["main"])
    """Components of a Debian archive, such as main or non-free-firmware."""
    keyring: Path | None = None
    """Keys that sign the repositories, relative to the site file; by default those this host has."""


class Image(System):
    """A golden image."""

    method: Literal["bootstrap", "install", "adopt"] = "bootstrap"
    """How it is made: bootstrap (no installer), install (the system's own installer, in a machine), or adopt
    (a machine that somebody else made, see images.adopt)."""
    install: Install = Field(default_factory=Install)
    """For the method install: the medium, by default our own installer, and the machine it runs in."""
    bundle: Name | None = None
    """For the method install: the image whose bundle the kickstart's liveimg unpacks."""
    windows: Windows | None = None
    """For the family windows: what its answer file says."""
    firmware: Literal["bios", "uefi"] = "bios"
    """What the machine boots with."""
    disk: Disk = Field(default_factory=Disk)
    """The disk: size, layout, partition table."""
    memory: Size = Field(default="1GiB", validate_default=True)
    """Memory of the machine that verifies the image, such as 2GiB."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long the image may take until it answers when it is verified."""

    @model_validator(mode="after")
    def _consistent(self) -> Image:
        if self.method == "adopt":
            known = {"family", "release", "method"}
            for name in sorted(self.model_fields_set - known):
                raise ValueError(f"{name}: is not for the method adopt, which takes a machine as it is")
        elif self.family == "windows":
            _check_windows(self)
        elif self.windows:
            raise ValueError(f"windows: has no meaning for the family {self.family}")
        elif not self.kickstart:
            raise ValueError("kickstart: is missing: the recipe, a file in kickstarts/")
        elif self.method == "bootstrap":
            for name in ("install", "bundle"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name}: is for the method install")
        elif self.family == "redhat" and not (self.install.location or self.install.kernel):
            raise ValueError("install: give the location of the installer's medium, or kernel and initrd")
        return self


def _check_windows(image: Image) -> None:
    """What the settings of a Windows image have to be together. Raises ValueError."""
    if image.method != "install":
        raise ValueError("method: it is Windows' own installer that makes it: write method: install")
    if not image.windows:
        raise ValueError("windows: is missing: what the answer file says")
    for name in _OF_LINUX:
        if name in image.model_fields_set:
            raise ValueError(f"{name}: has no meaning for Windows")
    if not image.install.location:
        raise ValueError("install: give the location of Windows' ISO")
    if image.release not in _LEAST:
        raise ValueError(f"release: {image.release!r} is none of {', '.join(_LEAST)}")
    if image.release == "win11" and image.firmware == "bios":
        raise ValueError("firmware: Windows 11 needs uefi")
    table = "gpt" if image.firmware == "uefi" else "msdos"
    if image.disk.table != table:
        raise ValueError(f"disk: Windows boots with {image.firmware} from table: {table} only")
    size, memory = _LEAST[image.release]
    if image.disk.size < size:
        raise ValueError(f"disk: {image.release} needs {size}MiB at least")
    if min(image.memory, image.install.memory) < memory:
        raise ValueError(f"memory: {image.release} needs {memory}MiB at least, here and in install:")
