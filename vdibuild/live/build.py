"""The pipeline of live systems: from a kickstart to an ISO that has booted, signed and versioned.

    packages -> system -> ISO -> verification -> version

Each step is kept under the hash of its inputs (see steps.py), so that a run does only what changed.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from vdibuild import __version__, bootstrap, families, hashing, host, pipeline, progress, rootfs, store
from vdibuild.disk import seal
from vdibuild.families import RepositoryState
from vdibuild.live import INITRAMFS, ISO, KERNEL, image, iso, software, squashfs, verification
from vdibuild.live.initramfs import Contents
from vdibuild.live.verification import LiveVerification
from vdibuild.machine import Hardware
from vdibuild.manifest import LiveManifest
from vdibuild.pipeline import Built, Run
from vdibuild.recipe import Recipe
from vdibuild.settings.live_systems import LiveSystem
from vdibuild.site import Site
from vdibuild.steps import Planned, Steps
from vdibuild.store import Version
from vdibuild.tree import Tree

_ARGUMENTS = "arguments"
_VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Kind:
    """What a live system is for. title: in the boot menu. prefix: with what its labels begin. contents: of
    its initramfs. arguments: the kernel's, besides those of every live system and of the kickstart.
    closed: see grub.menu. software: modules of vdibuild that it runs. block: KiB of its root file system that
    are compressed as one: large ones make it smaller, small ones are sooner there when a little of them is
    read. left_out: see squashfs.create. verified: see image.Settings. settings: the files of the partition
    KIOSKCFG, by name.
    """

    title: str
    prefix: str
    contents: Contents
    arguments: str = ""
    closed: bool = False
    software: tuple[str, ...] = ()
    block: int = 1024
    left_out: tuple[str, ...] = ()
    verified: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a build does, decided before anything is changed. epoch: see bootstrap.epoch. inputs: digests of
    what the system is made from, by name.
    """

    name: str
    live: LiveSystem
    recipe: Recipe
    repositories: tuple[RepositoryState, ...]
    epoch: int
    settings: image.Settings
    inputs: dict[str, str]
    packages: Planned
    system: Planned
    iso: Planned
    verification: Planned


def plan(site: Site, name: str, live: LiveSystem, kind: Kind, *, fresh: bool = False) -> Plan:
    """Decide what a build does; asks the repositories for their state, and changes nothing.

    name: what the system is called in the store. Raises InputError for everything a person has to correct,
    HostError for a repository that does not answer.
    """
    recipe = bootstrap.read_recipe(site, name, live)
    states = tuple(families.get(live.family).repository_states(recipe, live))
    epoch = bootstrap.epoch(states)
    steps = Steps(site.cache_directory / "steps", fresh=fresh)
    packages = bootstrap.plan(steps, live, recipe, states, epoch)
    inputs = bootstrap.inputs(site, live, recipe.text)
    made_from: dict[str, object] = {
        "name": name,
        "packages": packages.digest,
        "inputs": inputs,
        "kind": asdict(replace(kind, settings={})),
        "software": software.digest(kind.software),
        "code": hashing.of_code("rootfs", "disk.seal", "live.image", f"families.{live.family}"),
    }
    settings = image.Settings(
        label=_label(kind.prefix, hashing.of_values(made_from)),
        title=kind.title,
        arguments=" ".join([*kind.arguments.split(), *recipe.bootloader.append.split()]),
        timeout=recipe.bootloader.timeout,
        closed=kind.closed,
        left_out=kind.left_out,
        verified=kind.verified,
        contents=kind.contents,
        compression=squashfs.Compression(live.compression.method, live.compression.level, kind.block),
        settings=kind.settings,
    )
    customised = steps.plan("system", made_from)
    made = steps.plan(
        "ISO",
        {
            "system": customised.digest,
            "compression": asdict(settings.compression),
            "settings": dict(kind.settings),
        },
    )
    verified = steps.plan(
        "verification",
        {
            "iso": made.digest,
            "memory": live.memory,
            "seconds": live.boot_seconds,
            "code": hashing.of_code("live.verification"),
        },
    )
    return Plan(
        name=name,
        live=live,
        recipe=recipe,
        repositories=states,
        epoch=epoch,
        settings=settings,
        inputs=inputs
        | {step.title: step.digest for step in (packages, customised, made, verified)}
        | {"software": software.digest(kind.software)},
        packages=packages,
        system=customised,
        iso=made,
        verification=verified,
    )


def _label(prefix: str, digest: str) -> str:
    """A label that no other medium has: the inputs' digest, as far as there is room for it."""
    digits = base64.b32encode(bytes.fromhex(digest)).decode()
    return f"{prefix}_{digits}"[: iso.LABEL_LENGTH]


def build(
    site: Site,
    name: str,
    live: LiveSystem,
    kind: Kind,
    *,
    fresh: bool = False,
    keep: bool = False,
    promote: bool = True,
    on_failure: Callable[[Path], None] | None = None,
) -> Built:
    """Build a live system and publish it as a new version, or find that nothing changed since the last one.

    name: what it is called in the store. fresh: take no finished step of an earlier run. keep: leave the
    directory of a step that fails. promote: make the version the current one. on_failure: called with the
    directory of the step that failed. Raises the errors of the parts; a note on them names the log.
    """
    with pipeline.running(site, name, fresh=fresh, keep=keep, on_failure=on_failure) as run:
        return run.build(
            f"live system {name}",
            lambda: plan(site, name, live, kind, fresh=fresh),
            _Build(run, kind).make,
            promote=promote,
        )


@dataclass(frozen=True)
class _Build:
    """The steps of a run."""

    run: Run
    kind: Kind

    def make(self, planned: Plan, whole: progress.Step) -> Version:
        """Do the steps that are not done yet, and make their results a version."""
        cache = self.run.site.cache_directory
        packages = bootstrap.run(self.run.steps, planned.packages, planned.live, planned.recipe, cache)
        root = Tree(self._system(planned, packages) / bootstrap.TREE)
        made = self._iso(planned, root)
        verified = self._verification(planned, root, made / ISO)
        with progress.step("publish"):
            seen = LiveVerification.model_validate_json((verified / _VERIFICATION).read_bytes())
            described = self._describe(planned, root, (made / _ARGUMENTS).read_text(), seen, whole)
            distribution = families.get(planned.live.family).distribution(root)
            results = [*(made / name for name in (ISO, KERNEL, INITRAMFS)), verified / store.SCREENSHOT]
            return self.run.publish(results, described, distribution)

    def _system(self, planned: Plan, packages: Path) -> Path:
        family = families.get(planned.live.family)

        def work(directory: Path) -> None:
            copy = bootstrap.copy(packages, directory)
            rootfs.customise(copy, family, planned.recipe, planned.live, self.run.site.directory)
            software.lay(copy, self.kind.software)
            with progress.step("boot"):
                image.prepare(copy, family, planned.settings, planned.epoch)
            with progress.step("seal"):
                seal.seal(copy, family)

        return self.run.steps.run(planned.system, work)

    def _iso(self, planned: Plan, root: Tree) -> Path:
        family = families.get(planned.live.family)

        def work(directory: Path) -> None:
            made = image.create(
                root, family, planned.settings, planned.epoch, directory, self.run.site.directory
            )
            (directory / _ARGUMENTS).write_text(made.arguments)

        return self.run.steps.run(planned.iso, work)

    def _verification(self, planned: Plan, root: Tree, made: Path) -> Path:
        live, output = planned.live, self.run.log.parent
        kernel = families.get(live.family).kernels(root)[0]

        def work(directory: Path) -> None:
            found = host.accelerator(root.path(kernel.image), cache=self.run.site.cache_directory)
            seen = verification.verify(
                made,
                Hardware("bios", live.memory, found.name),
                seconds=live.boot_seconds,
                output=output,
                work=directory,
            )
            shutil.copyfile(output / store.SCREENSHOT, directory / store.SCREENSHOT)
            (directory / _VERIFICATION).write_text(seen.model_dump_json(indent=2), encoding="utf-8")

        return self.run.steps.run(planned.verification, work)

    def _describe(
        self, planned: Plan, root: Tree, arguments: str, seen: LiveVerification, whole: progress.Step
    ) -> LiveManifest:
        live = planned.live
        family = families.get(live.family)
        packages = tuple(family.installed(root))
        return LiveManifest(
            image=planned.name,
            version=self.run.staging.version,
            created=datetime.now(UTC),
            vdibuild=__version__,
            source_date_epoch=planned.epoch,
            family=live.family,
            release=live.release,
            architecture=bootstrap.architecture(packages),
            recipe=hashing.of_text(planned.recipe.text),
            inputs=planned.inputs,
            repositories=planned.repositories,
            packages=packages,
            kernel=family.kernels(root)[0],
            label=planned.settings.label,
            arguments=arguments,
            timings=whole.timings(),
            verification=seen,
        )
