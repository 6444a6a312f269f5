"""The golden pipeline: from a kickstart to a sealed, verified, signed and versioned image.

    packages -> system -> disk   -> verification -> version
                       -> bundle ---------------->

Each step is kept under the hash of its inputs (see steps.py), so that a run does only what changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from vdibuild import (
    __version__,
    bootstrap,
    bundle,
    families,
    hashing,
    host,
    process,
    progress,
    rootfs,
    sbom,
    store,
    verify,
)
from vdibuild.disk import bootloader, layout, seal, write
from vdibuild.disk.layout import Layout
from vdibuild.errors import VdibuildError
from vdibuild.families import RepositoryState
from vdibuild.machine import Hardware
from vdibuild.manifest import Manifest
from vdibuild.recipe import Recipe
from vdibuild.site import Image, Site
from vdibuild.steps import Planned, Steps
from vdibuild.store import Staging, Store, Version
from vdibuild.tree import Tree
from vdibuild.verify import Verification

_VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Plan:
    """What a build of an image does, decided before anything is changed.

    epoch: the time that the build's files get, in seconds since 1970: SOURCE_DATE_EPOCH, or when the
    newest of the repositories was made. inputs: digests of what the image is made from, by name.
    """

    name: str
    image: Image
    recipe: Recipe
    repositories: tuple[RepositoryState, ...]
    epoch: int
    layout: Layout
    inputs: dict[str, str]
    packages: Planned
    system: Planned
    disk: Planned
    bundle: Planned
    verification: Planned

    @property
    def steps(self) -> tuple[Planned, ...]:
        """The steps in the order they run in."""
        return (self.packages, self.system, self.disk, self.bundle, self.verification)


@dataclass(frozen=True)
class Built:
    """A build's result. unchanged: this version was there already, made of the same inputs."""

    version: Version
    unchanged: bool


def plan(site: Site, name: str | None = None, *, fresh: bool = False) -> Plan:
    """Decide what a build of an image does; asks the repositories for their state, and changes nothing.

    name: the image; by default the site's first. Raises InputError for everything a person has to correct,
    HostError for a repository that does not answer.
    """
    name, image = site.image(name)
    if image.method != "bootstrap":
        raise VdibuildError(f"image {name!r} has method: {image.method}, which cannot be built yet")
    recipe = bootstrap.read_recipe(site, name, image)
    states = tuple(families.get(image.family).repository_states(recipe, image))
    epoch = bootstrap.epoch(states)
    steps = Steps(site.cache_directory / "steps", fresh=fresh)

    packages = bootstrap.plan(steps, image, recipe, states, epoch)
    planned_layout = layout.plan(
        recipe.storage,
        firmware=image.firmware,
        size=image.disk.size,
        table=image.disk.table,
        seed=f"{name} {packages.digest} {recipe.text}",
        source=recipe.source,
    )
    inputs = bootstrap.inputs(site, image, recipe)
    system = steps.plan(
        "system",
        {
            "packages": packages.digest,
            "inputs": inputs,
            "layout": asdict(planned_layout),
            "code": hashing.of_code("rootfs", "disk.seal", f"families.{image.family}"),
        },
    )
    writer, reason = write.choose(planned_layout)
    disk = steps.plan(
        "disk", {"system": system.digest, "code": hashing.of_code("disk.write")}, f"{writer}: {reason}"
    )
    archive = steps.plan("bundle", {"system": system.digest, "code": hashing.of_code("bundle")})
    verification = steps.plan(
        "verification",
        {
            "disk": disk.digest,
            "memory": image.memory,
            "seconds": image.boot_seconds,
            "code": hashing.of_code("verify"),
        },
    )
    return Plan(
        name=name,
        image=image,
        recipe=recipe,
        repositories=states,
        epoch=epoch,
        layout=planned_layout,
        inputs=inputs | {step.title: step.digest for step in (packages, disk, archive, verification)},
        packages=packages,
        system=system,
        disk=disk,
        bundle=archive,
        verification=verification,
    )


def build(
    site: Site,
    name: str | None = None,
    *,
    fresh: bool = False,
    keep: bool = False,
    promote: bool = True,
    on_failure: Callable[[Path], None] | None = None,
) -> Built:
    """Build an image and publish it as a new version, or find that nothing changed since the last one.

    name: the image; by default the site's first. fresh: take no finished step of an earlier run. keep: leave
    the directory of a step that fails. promote: make the version the current one. on_failure: called with
    the directory of the step that failed. Raises the errors of the parts; a note on them names the log.
    """
    name, _ = site.image(name)
    versions = Store(site.artifacts_directory, site.keys)
    with versions.staging(name) as staging:
        log = site.artifacts_directory / ".logs" / name / store.LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with progress.logging_to(log):
            try:
                steps = Steps(site.cache_directory / "steps", fresh=fresh, keep=keep, on_failure=on_failure)
                return _Build(site, versions, steps, staging, log).run(promote)
            except VdibuildError as error:
                progress.log(f"error: {error}")
                error.add_note(f"the whole log: {log}")
                raise


def open_shell(directory: Path) -> None:
    """Open a shell in the system that a failed step left in `directory`; returns when it is left."""
    root = directory / bootstrap.TREE
    if not root.is_dir():
        progress.warn(f"there is no system in {directory} to open a shell in")
        return
    progress.warn("the step failed; this is a shell in its system, and the run ends when you leave it")
    process.interact(Tree(root).command(["/bin/sh", "-i"], network=True))


@dataclass(frozen=True)
class _Build:
    """One run of the pipeline, under the lock of its image."""

    site: Site
    versions: Store
    steps: Steps
    staging: Staging
    log: Path

    def run(self, promote: bool) -> Built:
        name = self.staging.image
        with progress.step(f"golden image {name}") as whole:
            self.steps.sweep()
            with progress.step("plan"):
                planned = plan(self.site, self.staging.image, fresh=self.steps.fresh)
            version = None if self.steps.fresh else self._unchanged(planned)
            unchanged = version is not None
            if version is None:
                with process.variables(SOURCE_DATE_EPOCH=str(planned.epoch)):
                    version = self._publish(planned, whole)
                self.steps.remember(name)
                if promote:
                    version = self.versions.promote(name, version.name)
        return Built(version, unchanged)

    def _unchanged(self, planned: Plan) -> Version | None:
        """The newest version, when it was made from the same inputs by the same code."""
        for version in self.versions.versions(planned.name)[-1:]:
            if version.manifest().inputs == planned.inputs:
                return version
        return None

    def _publish(self, planned: Plan, whole: progress.Step) -> Version:
        """Do the steps that are not done yet, and make their results a version."""
        packages = bootstrap.run(
            self.steps, planned.packages, planned.image, planned.recipe, self.site.cache_directory
        )
        system = Tree(self._system(planned, packages) / bootstrap.TREE)
        disk = self._disk(planned, system) / store.DISK
        archive = self._bundle(planned, system) / store.BUNDLE
        verification = self._verification(planned, system, disk)
        with progress.step("publish"):
            for file in (disk, archive, verification / store.SCREENSHOT):
                bootstrap.place(file, self.staging.path / file.name)
            seen = Verification.model_validate_json((verification / _VERIFICATION).read_bytes())
            described = self._describe(planned, system, seen, whole)
            sbom.write(
                self.staging.path / store.SBOM,
                image=planned.name,
                version=self.staging.version,
                packages=described.packages,
                distribution=families.get(planned.image.family).distribution(system),
                epoch=planned.epoch,
                creator=f"vdibuild-{__version__}",
            )
            shutil.copyfile(self.log, self.staging.path / store.LOG)
            return self.versions.publish(self.staging, described)

    def _system(self, planned: Plan, packages: Path) -> Path:
        family = families.get(planned.image.family)

        def work(directory: Path) -> None:
            system = bootstrap.copy(packages, directory)
            rootfs.customise(system, family, planned.recipe, planned.image, self.site.directory)
            with progress.step("boot"):
                family.prepare_boot(system, planned.recipe, planned.layout, self.site.directory)
                if planned.recipe.bootloader.install:
                    bootloader.prepare(system, planned.layout, family.boot_files(system))
            with progress.step("seal"):
                seal.seal(system, family)

        return self.steps.run(planned.system, work)

    def _disk(self, planned: Plan, system: Tree) -> Path:
        boot = families.get(planned.image.family).boot_files(system)

        def work(directory: Path) -> None:
            raw = directory / "disk.raw"
            with progress.step("write"):
                write.write(
                    system,
                    planned.layout,
                    boot if planned.recipe.bootloader.install else None,
                    raw,
                    self._accelerator(planned, system),
                )
            with progress.step("compress"):
                write.compress(raw, directory / store.DISK)
            raw.unlink()

        return self.steps.run(planned.disk, work)

    def _bundle(self, planned: Plan, system: Tree) -> Path:
        return self.steps.run(
            planned.bundle, lambda directory: bundle.create(system, directory / store.BUNDLE, planned.epoch)
        )

    def _verification(self, planned: Plan, system: Tree, disk: Path) -> Path:
        image = planned.image

        def work(directory: Path) -> None:
            hardware = Hardware(image.firmware, image.memory, self._accelerator(planned, system))
            seen = verify.verify(
                disk, "qcow2", hardware, seconds=image.boot_seconds, output=self.log.parent, work=directory
            )
            shutil.copyfile(self.log.parent / store.SCREENSHOT, directory / store.SCREENSHOT)
            (directory / _VERIFICATION).write_text(seen.model_dump_json(indent=2), encoding="utf-8")

        return self.steps.run(planned.verification, work)

    def _describe(
        self, planned: Plan, system: Tree, verification: Verification, whole: progress.Step
    ) -> Manifest:
        image = planned.image
        family = families.get(image.family)
        packages = tuple(family.installed(system))
        return Manifest(
            image=planned.name,
            version=self.staging.version,
            created=datetime.now(UTC),
            vdibuild=__version__,
            source_date_epoch=planned.epoch,
            family=image.family,
            release=image.release,
            architecture=bootstrap.architecture(packages),
            firmware=image.firmware,
            method=image.method,
            recipe=hashing.of_text(planned.recipe.text),
            inputs=planned.inputs,
            repositories=planned.repositories,
            packages=packages,
            kernel=family.kernels(system)[0],
            layout=planned.layout,
            virtual_size=planned.layout.size << 20,
            timings=whole.timings(),
            verification=verification,
        )

    def _accelerator(self, planned: Plan, system: Tree) -> Literal["kvm", "tcg"]:
        """What the image's guests run with; its own kernel tells whether KVM works."""
        kernel = families.get(planned.image.family).kernels(system)[0]
        return host.accelerator(system.path(kernel.image), cache=self.site.cache_directory).name
