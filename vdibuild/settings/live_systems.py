"""Systems that run from an ISO: the installer, and the kiosk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vdibuild.settings.images import System
from vdibuild.settings.values import Settings, Size

INSTALLER = "installer"
"""The name under which versions of the installer are kept."""

KIOSK = "kiosk"
"""The name under which versions of the kiosk are kept."""


class Compression(Settings):
    """How the root file system of a live system is compressed."""

    method: Literal["zstd", "xz"] = "zstd"
    """zstd, which is fast, or xz, which is smaller by a tenth and slower to read."""
    level: Annotated[int, Field(ge=1, le=22)] = 15
    """The level of zstd: 1 is quick, 22 small."""


class LiveSystem(System):
    """A system that runs from an ISO, and forgets everything when it is switched off."""

    family: Literal["debian", "redhat"]
    """The family of distributions: debian (also Ubuntu), or redhat (Fedora, EL)."""
    kickstart: str
    """The recipe: a file in kickstarts/."""
    compression: Compression = Field(default_factory=Compression)
    """How its root file system is compressed."""
    memory: Size = Field(default="1GiB", validate_default=True)
    """Memory of the machine that verifies it, such as 2GiB."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long it may take until it is up when it is verified."""


class Installer(LiveSystem):
    """The live system that installs others by their kickstarts; works as it is."""

    family: Literal["debian"] = "debian"
    """The family of distributions that it is made of."""
    release: str = "trixie"
    """The release that it is made of; what it installs may be another one."""
    kickstart: str = "installer-debian.ks.j2"
    """The recipe: a file in kickstarts/."""
    overlays: list[str] = Field(default_factory=lambda: ["installer"])
    """File trees to lay over the system, in this order: directories in overlays/."""
    compression: Compression = Field(default_factory=lambda: Compression(level=3))
    """How its root file system is compressed; by default quickly, as it is used on the host that makes it."""


class Kiosk(LiveSystem):
    """The live system of stations, which reach the pool and nothing else; works as it is."""

    family: Literal["debian", "redhat"] = "debian"
    """The family of distributions that it is made of; redhat needs a release and a kickstart of its own, such
    as fedora43 and kiosk-fedora.ks.j2."""
    release: str = "trixie"
    """The release that it is made of."""
    kickstart: str = "kiosk-debian.ks.j2"
    """The recipe: a file in kickstarts/."""
    overlays: list[str] = Field(default_factory=lambda: ["kiosk"])
    """File trees to lay over the system, in this order: directories in overlays/."""
    settings: dict[str, str] = Field(default_factory=dict)
    """What client.conf on the card says at first, such as server_ip; kiosk.configure changes it later."""
    check: Literal["medium", "verity"] | None = None
    """How a station knows that its card is as it was made. medium: all of it is compared with its digests at
    every start, which takes a while. verity: each block is compared with its hash whenever it is read. By
    default neither is done."""
