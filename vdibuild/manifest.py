"""What a stored version says about itself: manifest.json, beside the image it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)

from vdibuild.disk.layout import Layout
from vdibuild.errors import StoreError
from vdibuild.families import InstalledPackage, Kernel, RepositoryState
from vdibuild.live.verification import LiveVerification
from vdibuild.verify import Verification

NAME = "manifest.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class StoredFile(_Model):
    """A file of a version."""

    size: int
    """Bytes."""
    sha256: Digest


class Stored(_Model):
    """What every version says about itself."""

    schema_version: Literal[1] = 1
    """The version of this format; another one is refused."""
    image: str
    """The image's name in the site file."""
    version: str
    """The version, YYYYMMDD.N."""
    created: AwareDatetime
    """When it was built, in UTC."""
    vdibuild: str
    """The version of vdibuild that built it."""
    files: dict[str, StoredFile] = Field(default_factory=dict)
    """The version's other files by name; filled when it is published."""


class Described(Stored):
    """What a version that was built says besides: what it was made from, and what is in it."""

    source_date_epoch: int
    """The latest time that any file in it carries, seconds since 1970."""
    family: str
    """The family of distributions: debian or redhat."""
    release: str
    """The release, such as trixie or el9."""
    architecture: str
    """The architecture, as the distribution calls it."""
    recipe: Digest
    """SHA-256 of the rendered kickstart."""
    inputs: dict[str, Digest]
    """SHA-256 of everything else it was made from, by name: overlays, keys, settings."""
    repositories: tuple[RepositoryState, ...]
    """The package repositories, as they were."""
    packages: tuple[InstalledPackage, ...]
    """The installed packages, sorted by name."""
    kernel: Kernel
    """The kernel that it boots."""
    timings: dict[str, float]
    """Seconds by step; a nested step's name follows its parent's and a slash."""


class Manifest(Described):
    """A version of a golden image, and how it stood its test."""

    kind: Literal["disk"] = "disk"
    """A disk image, and its bundle."""
    firmware: Literal["bios", "uefi"]
    """What the machine boots with."""
    method: str
    """How it was made, such as bootstrap."""
    layout: Layout
    """Partitions, volumes and file systems, with their UUIDs."""
    virtual_size: int
    """Size of the disk as a guest sees it, in bytes."""
    verification: Verification
    """What was seen when it was booted."""


class LiveManifest(Described):
    """A version of a live system, and how it stood its test."""

    kind: Literal["live"] = "live"
    """An ISO, with its kernel and initramfs beside it."""
    label: str
    """The ISO's label, by which the system finds its medium."""
    arguments: str
    """The kernel's arguments, for whoever starts it without the ISO's boot loader."""
    verification: LiveVerification
    """What was seen when it was booted."""


class Devices(_Model):
    """The devices that a system has drivers for, as far as its machines have to have the same."""

    chipset: Literal["q35", "pc"] = "q35"
    """The machine's kind."""
    disk: Literal["virtio", "sata", "ide"] = "virtio"
    """What its disk is attached to."""
    network: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] = "virtio"
    """Its network card."""
    clock: Literal["utc", "localtime"] = "utc"
    """What its hardware clock shows; Windows wants the local time."""


class AdoptedManifest(Stored):
    """A copy of the disk of a machine that somebody else made."""

    kind: Literal["adopted"] = "adopted"
    """A disk image of which nothing is known but that it stood on its own."""
    domain: str
    """The machine, by its name in libvirt."""
    firmware: Literal["bios", "uefi"]
    """What the machine boots with."""
    devices: Devices
    """What it has drivers for."""
    virtual_size: int
    """Size of the disk as a guest sees it, in bytes."""


def _kind(data: dict[str, object]) -> object:
    return data.get("kind", "disk")


AnyManifest = Manifest | LiveManifest | AdoptedManifest
"""What a version may be."""

_READER: TypeAdapter[AnyManifest] = TypeAdapter(
    Annotated[
        Annotated[Manifest, Tag("disk")]
        | Annotated[LiveManifest, Tag("live")]
        | Annotated[AdoptedManifest, Tag("adopted")],
        Discriminator(_kind),
    ]
)


def read(path: Path) -> AnyManifest:
    """The manifest in a file. Raises StoreError when it is missing or not a manifest."""
    try:
        return _READER.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        # The first part is the kind's.
        key = ".".join(map(str, first["loc"][1:]))
        raise StoreError(f"{path} is not a manifest: {key + ': ' if key else ''}{first['msg']}") from None


def write(manifest: Stored, path: Path) -> None:
    """Write a manifest as indented JSON, keys in the order of the model."""
    path.write_text(manifest.model_dump_json(indent=2, warnings="error") + "\n", encoding="utf-8")
