"""What a run of the benchmark measured: the currency between measuring and reporting."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

OURS = "vdibuild"
EQUAL = "vdibuild, with the peers' base packages"


@dataclass
class Cold:
    """A build from nothing. seconds: all of it, without verification. size: the compressed disk's, in bytes.

    downloaded: bytes of packages. whole_seconds: with verification, of ours. steps: ours, in seconds by name,
    nested ones joined by a slash.
    """

    builder: str
    seconds: float
    size: int
    downloaded: int
    whole_seconds: float | None = None
    steps: dict[str, float] = field(default_factory=dict)


@dataclass
class Results:
    """All that was measured, as it is written to artifacts/bench. Times in seconds, sizes in bytes.

    missing: packages to install by the builder that lacks them. boots: what was seen of each image. packages:
    those in each image. overlay, whole_overlay: a build after one overlay file changed, without and with
    verification. disk, bare_disk: the finished tree to the compressed disk, by us and by mke2fs and
    qemu-img. unpack: the system from its bundle. second_packages, second_indices: downloaded by a second
    build. differing: what differs where same_disk is false.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    missing: dict[str, str]
    boots: dict[str, str] = field(default_factory=dict)
    packages: dict[str, list[str]] = field(default_factory=dict)
    cold: list[Cold] = field(default_factory=list)
    unchanged: list[float] = field(default_factory=list)
    overlay: list[float] = field(default_factory=list)
    whole_overlay: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    bare_disk: list[float] = field(default_factory=list)
    unpack: list[float] = field(default_factory=list)
    tree_files: int = 0
    tree_bytes: int = 0
    second_packages: int = -1
    second_indices: int = -1
    same_bundle: bool | None = None
    same_disk: bool | None = None
    differing: str = ""

    def of(self, builder: str) -> list[Cold]:
        """The cold builds of one builder."""
        return [one for one in self.cold if one.builder == builder]

    def median(self, builder: str) -> float:
        """Seconds of one builder's cold builds."""
        return statistics.median(one.seconds for one in self.of(builder))
