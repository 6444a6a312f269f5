"""What a machine is made of: a version of an image in the store, or a bundle of a repository.

The bundle of a version is of a sealed system, made for the disk that is described with it. A repository's may
be of any system as it ran, and may come without a disk: it gets what it lacks when it is unpacked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from vdibuild import families, hashing, progress, repository
from vdibuild.disk.layout import Layout
from vdibuild.errors import BundleError, InputError, VdibuildError
from vdibuild.settings.machines import Machine
from vdibuild.site import Site
from vdibuild.store import BUNDLE, DISK, Store, Version


class Source(Protocol):
    """A system that machines are made of.

    name, version: what it is called. family: see families.get. layout: the disk it was made for, where it was
    for one. sealed: nothing in it belongs to one machine. archive: its bundle. unpacked: that one's bytes
    without compression, where they are known. disk: its disk as a qcow2, with that file's SHA-256.
    """

    name: str
    version: str
    family: str
    layout: Layout | None
    sealed: bool
    archive: Path
    disk: tuple[Path, str] | None

    @property
    def size(self) -> int:
        """Bytes of the archive."""

    def trust(self, *, archive: bool) -> None:
        """Check who signed it, and the archive's every byte where that is used. Raises StoreError and
        BundleError.
        """


class Stored:
    """See Source: a version in the store."""

    sealed = True

    def __init__(self, store: Store, version: Version) -> None:
        described = version.manifest()
        if described.family == "windows":
            raise VdibuildError(f"{version.image} is Windows: provision knows Linux", "clone it with virsh")
        self._store, self._version, self._described = store, version, described
        self.name, self.version, self.family = version.image, version.name, described.family
        self.layout: Layout | None = described.layout
        self.archive = version.path / BUNDLE
        self.disk: tuple[Path, str] | None = (version.path / DISK, described.files[DISK].sha256)

    @property
    def size(self) -> int:
        """See Source."""
        return self._described.files[BUNDLE].size

    def trust(self, *, archive: bool) -> None:
        """See Source."""
        # What is used of the disk is checked on its way (PreparedDisks).
        names = (BUNDLE,) if archive else ()
        if self._store.trust(self._version, *names) != self._described:
            raise VdibuildError(f"{self._version.path} was changed meanwhile", "run this again")


class Published:
    """See Source: a bundle of a repository, whose description's signature has been checked."""

    sealed = False
    disk: tuple[Path, str] | None = None

    def __init__(self, site: Site, name: str) -> None:
        place = site.bundle_repository
        if place is None:
            raise InputError(
                site.source,
                None,
                "there is no repository of bundles",
                "name one: bundles: a directory or a URL",
            )
        with progress.step(f"get the bundle {name}"):
            self._described = repository.signed(place, name, site.keys)
            family = families.of(self._described.os)
            if family is None:
                what = self._described.os.get("PRETTY_NAME", "no system that says what it is")
                raise BundleError(
                    f"the bundle {name} holds {what}", "provision knows Debian's and Red Hat's families"
                )
            self.name, self.family = f"bundle {name}", family
            self.version = self._described.sha256[:12]
            self.layout: Layout | None = self._described.layout
            cache = site.cache_directory / "bundles"
            self.archive = repository.at(place).archive(self._described, cache)

    @property
    def size(self) -> int:
        """See Source."""
        return self._described.size

    def trust(self, *, archive: bool) -> None:
        """See Source."""
        if archive:
            with progress.step("check the bundle"):
                if hashing.of_file(self.archive) != self._described.sha256:
                    raise BundleError(
                        f"{self.archive} is not what was signed", "remove it and run this again"
                    )


@contextlib.contextmanager
def opened(site: Site, machine: Machine) -> Iterator[Source]:
    """What a machine is made of, which stays where it is for as long as the block runs."""
    if machine.bundle:
        yield Published(site, machine.bundle)
        return
    store = Store(site.artifacts_directory, site.keys)
    if not machine.image:
        raise TypeError("a machine without an image has a bundle")
    with store.using(machine.image, machine.version) as version:
        yield Stored(store, version)
