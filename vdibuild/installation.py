"""The system of an image that is installed: the guest that does it, and what it left, as a tree.

The medium is the site's, or for Debian our own installer. A kickstart's `liveimg` finds the bundle of
another image on a disk that the guest gets beside its own.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from vdibuild import hashing, host, install, installer, media, progress, rootfs
from vdibuild.bootstrap import TREE, copy
from vdibuild.disk import bootloader, inspection, seal
from vdibuild.disk.layout import Layout
from vdibuild.errors import InstallationError
from vdibuild.families import Family
from vdibuild.install import MARKER, ExtraDisk, Job, Media, events
from vdibuild.kickstart.anaconda import Installation
from vdibuild.live import INITRAMFS, ISO, KERNEL
from vdibuild.machine import Hardware
from vdibuild.manifest import LiveManifest
from vdibuild.recipe import Recipe
from vdibuild.settings.images import Image
from vdibuild.settings.live_systems import INSTALLER
from vdibuild.site import Site
from vdibuild.steps import Planned, Steps
from vdibuild.store import BUNDLE, Store, Version
from vdibuild.tree import Tree

_LAYOUT = "layout.json"
_READER = TypeAdapter(Layout)
_BUNDLE_SERIAL = "vdibuild-bundle"
"""The disk with the bundle: /dev/disk/by-id/virtio-vdibuild-bundle, as kickstarts name it."""
_INSTALLER_SERIAL = "vdibuild-installer"


@dataclass(frozen=True)
class Sources:
    """The versions an installation takes from the store: our installer, where the image names no medium of
    its own; the image whose bundle is installed. None also where there is no promoted version yet.
    """

    installer: Version | None
    bundle: Version | None


def sources(site: Site, image: Image) -> Sources:
    """What is in the store now."""
    versions = Store(site.artifacts_directory, site.keys)

    def promoted(name: str | None) -> Version | None:
        found = versions.versions(name) if name else []
        return next((version for version in found if version.promoted), None)

    own = not (image.install.location or image.install.kernel)
    return Sources(promoted(INSTALLER if own else None), promoted(image.bundle))


def prepare(site: Site, image: Image) -> None:
    """Build our installer, where the image needs it and there is none, or one of other code.

    Before anything is built for the installation: raises HostError where libvirt does not answer, or its
    QEMU could not read what is built.
    """
    found = sources(site, image)
    own = not (image.install.location or image.install.kernel)
    outdated = own and (found.installer is None or not installer.current(found.installer))
    if outdated or (image.bundle and found.bundle is None):
        with events.connected(site.libvirt) as connection:
            directories = [_existing(site.cache_directory), _existing(site.artifacts_directory)]
            media.check_access(directories, media.emulator_user(connection))
    if outdated:
        installer.build(site)


def _existing(directory: Path) -> Path:
    """The directory, or the one it will be made in."""
    return next(one for one in (directory, *directory.parents) if one.is_dir())


def plan(steps: Steps, site: Site, name: str, image: Image, recipe: Recipe | Installation) -> Planned:
    """The step that installs an image's system."""
    found = sources(site, image)
    medium = [image.install.location or "", image.install.sha256 or "", image.install.kernel or ""]
    if not medium[0] and not medium[2]:
        medium = [found.installer.described().files[ISO].sha256 if found.installer else "to be built"]
    content = found.bundle.described().files[BUNDLE].sha256 if found.bundle else ""
    what = f"the bundle of {image.bundle}" if image.bundle else "packages"
    return steps.plan(
        "installation",
        {
            "name": name,
            "kickstart": hashing.of_text(recipe.text),
            "firmware": image.firmware,
            "size": image.disk.size,
            "medium": medium,
            "initrd": image.install.initrd or "",
            "arguments": image.install.arguments,
            "bundle": content,
            "code": hashing.of_code("install", "disk.inspection"),
        },
        f"virt-install: {what}",
    )


def epoch(site: Site, image: Image) -> int:
    """The time that the image's files get, in seconds since 1970: SOURCE_DATE_EPOCH, the bundle's, or now.

    An installer draws lots: two installations differ, whatever the time.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given.isdecimal():
        return int(given)
    found = sources(site, image).bundle
    return found.described().source_date_epoch if found else int(time.time())


def run(
    steps: Steps,
    planned: Planned,
    site: Site,
    name: str,
    image: Image,
    recipe: Recipe | Installation,
    output: Path,
) -> Path:
    """Install the system, or find it installed; returns the step's directory.

    output: the directory for the picture of a failure. Raises what install.run raises, and InstallationError
    where the installer did not come to the kickstart's end.
    """

    def work(directory: Path) -> None:
        accelerator = host.accelerator(cache=site.cache_directory).name
        with _ordered(site, name, image, recipe, accelerator, directory, output) as job:
            _install(job, directory, accelerator)

    return steps.run(planned, work)


def layout(installed: Path) -> Layout:
    """The disk that an installer made. installed: the finished step's directory."""
    return _READER.validate_json((installed / _LAYOUT).read_bytes())


def complete(installed: Path, directory: Path, family: Family, image: Image, site_directory: Path) -> Tree:
    """A copy of an installed system in another step's directory, with what the image adds to it, sealed."""
    system = copy(installed, directory)
    rootfs.lay_overlays(system, image, site_directory)
    rootfs.play(system, image, site_directory)
    with progress.step("boot"):
        bootloader.prepare(system, layout(installed), family.boot_files(system))
    with progress.step("seal"):
        seal.seal(system, family)
    return system


@contextlib.contextmanager
def _ordered(
    site: Site,
    name: str,
    image: Image,
    recipe: Recipe | Installation,
    accelerator: Literal["kvm", "tcg"],
    directory: Path,
    output: Path,
) -> Iterator[Job]:
    """The job for the driver; the versions it takes from the store cannot be removed meanwhile."""
    versions = Store(site.artifacts_directory, site.keys)
    settings, disks = image.install, []
    with contextlib.ExitStack() as stack:
        if image.bundle:
            version = _checked(versions, image.bundle, stack)
            disks.append(ExtraDisk(version.path / BUNDLE, _BUNDLE_SERIAL))
        if settings.location or settings.kernel:
            medium = install.obtain(settings, site.directory, site.cache_directory / "media")
        else:
            version = _checked(versions, INSTALLER, stack)
            described = version.described()
            assert isinstance(described, LiveManifest)  # noqa: S101 (what its name stands for)
            medium = Media(kernel=str(version.path / KERNEL), initrd=str(version.path / INITRAMFS))
            disks.append(ExtraDisk(version.path / ISO, _INSTALLER_SERIAL))
            words = [*described.arguments.split(), f"vdibuild.release={image.release}", *settings.arguments]
            settings = settings.model_copy(update={"arguments": words})
        # QEMU emulates several processors on threads: one may run into code that another is patching, and
        # the guest's kernel panics ("Oops: int3"; met with QEMU 7.2).
        cpus = 1 if accelerator == "tcg" else settings.cpus
        yield Job(
            name=name,
            uri=site.libvirt,
            kickstart=recipe.text,
            media=medium,
            size=image.disk.size,
            hardware=Hardware(image.firmware, settings.memory, accelerator, cpus),
            settings=settings,
            state=site.artifacts_directory / ".installations",
            work=directory,
            output=output,
            disks=disks,
        )


def _checked(versions: Store, name: str, stack: contextlib.ExitStack) -> Version:
    """The promoted version, whose signature and bytes are right, and which stays for as long as the stack."""
    stack.enter_context(versions.using(name))
    with progress.step(f"check {name}"):
        return versions.verify(name).version


def _install(job: Job, directory: Path, accelerator: str) -> None:
    with install.run(job) as installed, tempfile.TemporaryDirectory(dir=directory) as scratch:
        with inspection.opened(installed.disk, Path(scratch), accelerator) as disk:
            system = disk.extract(directory / TREE)
            (directory / _LAYOUT).write_bytes(_READER.dump_json(disk.found.layout))
        if not system.exists(MARKER) or system.read(MARKER).strip() != installed.nonce:
            raise InstallationError(
                "marker",
                f"the installation of {job.name} ended before the kickstart's end",
                "the log says how far it came",
            )
        system.remove(MARKER)
