"""The site file `vdibuild.yaml` as typed models: every setting has one home, a default and a sentence."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from vdibuild.errors import InputError, VdibuildError

DEFAULT_NAME = "vdibuild.yaml"

_UNITS = {"": 1 / (1 << 20), "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def _mebibytes(value: object) -> object:
    """A size such as 8GiB, 512M or 1.5 TiB, in MiB; a bare number is refused: of what?"""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"give a unit with the size: {value}MiB or {value}GiB")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is no size; write it like 8GiB or 512MiB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size != int(size) or size < 1:
        raise ValueError(f"{value!r} is not a whole number of MiB")
    return int(size)


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError(f"{value!r} is no name: lower-case letters, digits, dots, dashes, at most 63")
    return value


Size = Annotated[
    int,
    BeforeValidator(_mebibytes, json_schema_input_type=str),
]
Name = Annotated[str, AfterValidator(_name)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Disk(_Model):
    """The disk of an image."""

    size: Size = Field(default=4096)
    """Size of the disk as a guest sees it, such as 8GiB."""
    layout: str = "plain-ext4"
    """Which partitions: the name of a file in kickstarts/layouts, without its ending."""
    table: Literal["gpt", "msdos"] = "gpt"
    """The partition table."""


class Image(_Model):
    """A golden image."""

    family: Literal["debian", "redhat"]
    """The family of distributions: debian (also Ubuntu), or redhat (Fedora, EL)."""
    release: str
    """The release: a Debian or Ubuntu code name such as trixie; for redhat fedora43, el9, el10."""
    method: Literal["bootstrap"] = "bootstrap"
    """How it is made: bootstrap (no installer)."""
    kickstart: str
    """The recipe: a file in kickstarts/."""
    variables: dict[str, str | int | bool | list[str]] = Field(default_factory=dict)
    """Values for the recipe's own variables."""
    firmware: Literal["bios", "uefi"] = "bios"
    """What the machine boots with."""
    disk: Disk = Field(default_factory=Disk)
    """The disk: size, layout, partition table."""
    packages: list[str] = Field(default_factory=list)
    """Packages to install in addition to the recipe's."""
    overlays: list[str] = Field(default_factory=list)
    """File trees to lay over the system, in this order: directories in overlays/."""
    authorized_keys: list[str] = Field(default_factory=list)
    """Public SSH keys that may log in as root."""
    playbook: Path | None = None
    """An Ansible playbook that configures the system; relative to the site file."""
    mirror: str | None = None
    """Where packages come from; by default what this host's own package manager uses."""
    security_mirror: str | None = None
    """Where Debian's security updates come from; by default this host's, else none."""
    components: list[str] = Field(default_factory=lambda: ["main"])
    """Components of a Debian archive, such as main or non-free-firmware."""
    keyring: Path | None = None
    """Keys that sign the repositories; by default the ones this host has for the release."""
    memory: Size = Field(default=1024)
    """Memory of the machine that verifies the image, such as 2GiB."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long the image may take until it answers when it is verified."""


class Keys(_Model):
    """Who signs images, and whose signatures count."""

    signing: Path = Path("~/.config/vdibuild/signing_key")
    """The private key that signs versions; made on first use."""
    identity: str = "vdibuild"
    """The name under which this key signs."""
    allowed_signers: list[str] = Field(default_factory=list)
    """Further keys that count, in ssh-keygen's allowed_signers form: NAME KEYTYPE KEY."""


class Site(_Model):
    """A site: its images, and where things live."""

    images: dict[Name, Image] = Field(min_length=1)
    """The golden images, by name."""
    artifacts: Path = Path("artifacts")
    """Where what was built is kept; relative to the site file."""
    cache: Path | None = None
    """Where downloads and finished steps are kept; by default in the artifacts directory."""
    libvirt: str = "qemu:///system"
    """The libvirt connection."""
    keys: Keys = Field(default_factory=Keys)
    """Signing keys."""
