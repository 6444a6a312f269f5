"""One run of a pipeline, from its plan to a version in the store; what its steps are is not said here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from vdibuild import __version__, bootstrap, process, progress, sbom, store
from vdibuild.errors import VdibuildError
from vdibuild.families import Distribution
from vdibuild.manifest import Described
from vdibuild.site import Site
from vdibuild.steps import Steps
from vdibuild.store import Staging, Store, Version


class Plan(Protocol):
    """What a run does, decided before anything is changed."""

    @property
    def epoch(self) -> int:
        """The time that its files get, in seconds since 1970 (see bootstrap.epoch)."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what the version is made from, by name."""


_Plan = TypeVar("_Plan", bound=Plan)


@dataclass(frozen=True)
class Built:
    """A run's result. unchanged: this version was there already, made of the same inputs."""

    version: Version
    unchanged: bool


@dataclass(frozen=True)
class Run:
    """One run, under the lock of its image. staging: the version it makes. log: written as it goes; what else
    a run leaves for a person to look at is put beside it.
    """

    site: Site
    versions: Store
    steps: Steps
    staging: Staging
    log: Path

    def build(
        self,
        title: str,
        plan: Callable[[], _Plan],
        make: Callable[[_Plan, progress.Step], Version],
        *,
        promote: bool,
    ) -> Built:
        """Publish a new version, or find that nothing changed since the last one.

        make: does the plan's steps and publishes their results; it gets the step whose timings are the
        run's. promote: make a new version the current one, and one that is there where none is.
        """
        name = self.staging.image
        with progress.step(title) as whole:
            self.steps.sweep()
            with progress.step("plan"):
                planned = plan()
            version = None if self.steps.fresh else self._unchanged(planned)
            if version is not None:
                # Nobody has chosen: a run may have been killed before it could promote what it published.
                if promote and not any(one.promoted for one in self.versions.versions(name)):
                    version = self.versions.promote(name, version.name)
                return Built(version, unchanged=True)
            with process.variables(SOURCE_DATE_EPOCH=str(planned.epoch)):
                version = make(planned, whole)
            self.steps.remember(name)
            if promote:
                version = self.versions.promote(name, version.name)
        return Built(version, unchanged=False)

    def _unchanged(self, planned: Plan) -> Version | None:
        """The newest version, when it was made from the same inputs by the same code."""
        for version in self.versions.versions(self.staging.image)[-1:]:
            if version.described().inputs == planned.inputs:
                return version
        return None

    def publish(self, results: Iterable[Path], described: Described, distribution: Distribution) -> Version:
        """Make the files that the steps left a version, with its bill of materials and its log."""
        for file in results:
            bootstrap.place(file, self.staging.path / file.name)
        sbom.write(
            self.staging.path / store.SBOM,
            image=described.image,
            version=described.version,
            packages=described.packages,
            distribution=distribution,
            epoch=described.source_date_epoch,
            creator=f"vdibuild-{__version__}",
        )
        shutil.copyfile(self.log, self.staging.path / store.LOG)
        return self.versions.publish(self.staging, described)


@contextlib.contextmanager
def running(
    site: Site,
    name: str,
    *,
    fresh: bool,
    keep: bool,
    on_failure: Callable[[Path], None] | None,
) -> Iterator[Run]:
    """A run for as long as the block runs. Errors that leave it get a note that names the log.

    name: what is built, as the store calls it. fresh: take no finished step of an earlier run. keep: leave
    the directory of a step that fails. on_failure: called with the directory of the step that failed. Raises
    BusyError when another run has the image.
    """
    versions = Store(site.artifacts_directory, site.keys)
    with versions.staging(name) as staging:
        log = site.artifacts_directory / ".logs" / name / store.LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with progress.logging_to(log):
            try:
                steps = Steps(site.cache_directory / "steps", fresh=fresh, keep=keep, on_failure=on_failure)
                yield Run(site, versions, steps, staging, log)
            except VdibuildError as error:
                progress.log(f"error: {error}")
                error.add_note(f"the whole log: {log}")
                raise
