"""The golden pipeline: from a kickstart to a sealed, verified, signed and versioned image.

    packages     -> system -> disk   -> verification -> version
    installation              bundle ----------------->

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
    installation,
    pipeline,
    process,
    progress,
    rootfs,
    store,
    verify,
)
from vdibuild.disk import bootloader, layout, seal, write
from vdibuild.disk.layout import Layout
from vdibuild.errors import InputError, VdibuildError
from vdibuild.families import RepositoryState
from vdibuild.kickstart import anaconda
from vdibuild.kickstart.anaconda import Installation
from vdibuild.machine import Hardware
from vdibuild.manifest import Manifest
from vdibuild.pipeline import Built, Run
from vdibuild.recipe import Recipe
from vdibuild.settings.images import Image
from vdibuild.site import Site
from vdibuild.steps import Planned, Steps
from vdibuild.store import Version
from vdibuild.tree import Tree
from vdibuild.verify import Verification

_VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Plan:
    """What a build of an image does, decided before anything is changed.

    epoch: the time that the build's files get, in seconds since 1970: SOURCE_DATE_EPOCH, or when the
    newest of the repositories was made. layout: None where an installer decides it. inputs: digests of what
    the image is made from, by name. content: the step that packages or an installation come from.
    """

    name: str
    image: Image
    recipe: Recipe | Installation
    repositories: tuple[RepositoryState, ...]
    epoch: int
    layout: Layout | None
    inputs: dict[str, str]
    content: Planned
    system: Planned
    disk: Planned
    bundle: Planned
    verification: Planned

    @property
    def steps(self) -> tuple[Planned, ...]:
        """The steps in the order they run in."""
        return (self.content, self.system, self.disk, self.bundle, self.verification)


def plan(site: Site, name: str | None = None, *, fresh: bool = False) -> Plan:
    """Decide what a build of an image does; asks the repositories for their state, and changes nothing.

    name: the image; by default the site's first. Raises InputError for everything a person has to correct,
    HostError for a repository that does not answer.
    """
    name, image = site.image(name)
    if image.method == "adopt":
        raise InputError(
            site.source, None, f"the image {name} is not built", f"images.adopt DOMAIN --image {name}"
        )
    steps = Steps(site.cache_directory / "steps", fresh=fresh)
    if image.method == "install":
        return _plan_installed(steps, site, name, image)
    recipe = bootstrap.read_recipe(site, name, image)
    states = tuple(families.get(image.family).repository_states(recipe, image))
    epoch = bootstrap.epoch(states)
    packages = bootstrap.plan(steps, image, recipe, states, epoch)
    planned_layout = _layout(image, recipe, seed=f"{name} {packages.digest} {recipe.text}")
    inputs = bootstrap.inputs(site, image, recipe.text)
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
    later = _plan_later(steps, image, system, f"{writer}: {reason}")
    return Plan(
        name,
        image,
        recipe,
        states,
        epoch,
        planned_layout,
        inputs | _digests(packages, *later),
        packages,
        system,
        *later,
    )


def _plan_installed(steps: Steps, site: Site, name: str, image: Image) -> Plan:
    """As `plan`, for the method install."""
    if image.family == "windows":
        raise VdibuildError(
            f"image {name!r}: Windows cannot be built here yet",
            "./inv windows.answers writes its answer medium; docs/windows.md says how to go on",
        )
    recipe: Recipe | Installation
    states: tuple[RepositoryState, ...] = ()
    if anaconda.executes(image):
        recipe = anaconda.read(site, name, image)
    else:
        recipe = bootstrap.read_recipe(site, name, image)
        # Our installer decides the same: whether it fits can be said now.
        _layout(image, recipe, seed=name)
        if not recipe.live_image:
            states = tuple(families.get(image.family).repository_states(recipe, image))
    installed = installation.plan(steps, site, name, image, recipe)
    inputs = bootstrap.inputs(site, image, recipe.text)
    system = steps.plan(
        "system",
        {
            "installation": installed.digest,
            "inputs": inputs,
            "code": hashing.of_code("installation", f"families.{image.family}"),
        },
    )
    later = _plan_later(steps, image, system, "as the installer laid it out")
    digests = inputs | _digests(installed, *later)
    epoch = installation.epoch(site, image)
    return Plan(name, image, recipe, states, epoch, None, digests, installed, system, *later)


def _layout(image: Image, recipe: Recipe, *, seed: str) -> Layout:
    return layout.plan(
        recipe.storage,
        firmware=image.firmware,
        size=image.disk.size,
        table=image.disk.table,
        seed=seed,
        source=recipe.source,
    )


def _plan_later(steps: Steps, image: Image, system: Planned, detail: str) -> tuple[Planned, Planned, Planned]:
    """The steps after the system is there: disk, bundle, verification. detail: how the disk is written."""
    disk = steps.plan("disk", {"system": system.digest, "code": hashing.of_code("disk.write")}, detail)
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
    return disk, archive, verification


def _digests(*steps: Planned) -> dict[str, str]:
    return {step.title: step.digest for step in steps}


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
    name, image = site.image(name)
    if image.method != "bootstrap":
        # What a person has to correct is said before minutes go into the installer and the bundle.
        plan(site, name, fresh=fresh)
        _prepare(site, image)
    with pipeline.running(site, name, fresh=fresh, keep=keep, on_failure=on_failure) as run:
        return run.build(
            f"golden image {name}",
            lambda: plan(site, name, fresh=fresh),
            _Build(run).make,
            promote=promote,
        )


def _prepare(site: Site, image: Image) -> None:
    """Build what an installation needs and the store does not have: our installer, the bundle's image."""
    installation.prepare(site, image)
    if image.bundle and installation.sources(site, image).bundle is None:
        build(site, image.bundle)


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
    """The steps of a run."""

    run: Run

    def make(self, planned: Plan, whole: progress.Step) -> Version:
        """Do the steps that are not done yet, and make their results a version."""
        content = self._content(planned)
        system = Tree(self._system(planned, content) / bootstrap.TREE)
        used = planned.layout or installation.layout(content)
        disk = self._disk(planned, system, used) / store.DISK
        archive = self._bundle(planned, system) / store.BUNDLE
        verification = self._verification(planned, system, disk)
        with progress.step("publish"):
            seen = Verification.model_validate_json((verification / _VERIFICATION).read_bytes())
            described = self._describe(planned, system, used, seen, whole)
            distribution = families.get(planned.image.family).distribution(system)
            results = (disk, archive, verification / store.SCREENSHOT)
            return self.run.publish(results, described, distribution)

    def _content(self, planned: Plan) -> Path:
        image, recipe = planned.image, planned.recipe
        if isinstance(recipe, Recipe) and image.method == "bootstrap":
            return bootstrap.run(
                self.run.steps, planned.content, image, recipe, self.run.site.cache_directory
            )
        return installation.run(
            self.run.steps, planned.content, self.run.site, planned.name, image, recipe, self.run.log.parent
        )

    def _system(self, planned: Plan, content: Path) -> Path:
        family, recipe, used = families.get(planned.image.family), planned.recipe, planned.layout

        def work(directory: Path) -> None:
            if used is None or not isinstance(recipe, Recipe):
                installation.complete(content, directory, family, planned.image, self.run.site.directory)
                return
            system = bootstrap.copy(content, directory)
            rootfs.customise(system, family, recipe, planned.image, self.run.site.directory)
            with progress.step("boot"):
                family.prepare_boot(system, recipe, used, self.run.site.directory)
                if recipe.bootloader.install:
                    bootloader.prepare(system, used, family.boot_files(system))
            with progress.step("seal"):
                seal.seal(system, family)

        return self.run.steps.run(planned.system, work)

    def _disk(self, planned: Plan, system: Tree, used: Layout) -> Path:
        boot = families.get(planned.image.family).boot_files(system) if _boots(planned.recipe) else None

        def work(directory: Path) -> None:
            raw = directory / "disk.raw"
            with progress.step("write"):
                write.write(system, used, boot, raw, self._accelerator(planned, system))
            with progress.step("compress"):
                write.compress(raw, directory / store.DISK)
            raw.unlink()

        return self.run.steps.run(planned.disk, work)

    def _bundle(self, planned: Plan, system: Tree) -> Path:
        def work(directory: Path) -> None:
            bundle.create(system, directory / store.BUNDLE, planned.epoch)

        return self.run.steps.run(planned.bundle, work)

    def _verification(self, planned: Plan, system: Tree, disk: Path) -> Path:
        image = planned.image

        def work(directory: Path) -> None:
            hardware = Hardware(image.firmware, image.memory, self._accelerator(planned, system))
            seen = verify.verify(
                disk,
                "qcow2",
                hardware,
                seconds=image.boot_seconds,
                output=self.run.log.parent,
                work=directory,
            )
            shutil.copyfile(self.run.log.parent / store.SCREENSHOT, directory / store.SCREENSHOT)
            (directory / _VERIFICATION).write_text(seen.model_dump_json(indent=2), encoding="utf-8")

        return self.run.steps.run(planned.verification, work)

    def _describe(
        self, planned: Plan, system: Tree, used: Layout, verification: Verification, whole: progress.Step
    ) -> Manifest:
        image = planned.image
        family = families.get(image.family)
        packages = tuple(family.installed(system))
        return Manifest(
            image=planned.name,
            version=self.run.staging.version,
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
            layout=used,
            virtual_size=used.size << 20,
            timings=whole.timings(),
            verification=verification,
        )

    def _accelerator(self, planned: Plan, system: Tree) -> Literal["kvm", "tcg"]:
        """What the image's guests run with; its own kernel tells whether KVM works."""
        kernel = families.get(planned.image.family).kernels(system)[0]
        return host.accelerator(system.path(kernel.image), cache=self.run.site.cache_directory).name


def _boots(recipe: Recipe | Installation) -> bool:
    """Whether the disk gets a boot loader: Anaconda always installs one."""
    return not isinstance(recipe, Recipe) or recipe.bootloader.install
