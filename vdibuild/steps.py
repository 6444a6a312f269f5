"""Finished steps, kept under the hash of all their inputs: a run goes on from the last good one.

    DIRECTORY/NAME-KEY/          a finished step's files, made in one rename
    DIRECTORY/.work-XXXXXXXX/    a step under way (scratch.beside)
    DIRECTORY/.failed-XXXXXXXX/  a failed step's files, where they were to be kept
    DIRECTORY/.uses/IMAGE.json   the steps of an image's last good build: what `sweep` keeps

A run that was killed leaves its `.work-` directory; the next step, or `sweep`, removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vdibuild import hashing, progress, scratch, tree
from vdibuild.errors import HostError
from vdibuild.output import replace

_WORK = "work"
_KEEP_SECONDS = 24 * 3600
_KEY_DIGITS = 32


@dataclass(frozen=True)
class Planned:
    """A step of a plan. digest: of all its inputs. key: the name its result is kept under; cached: it is
    there. detail: how the step is done, where there is a choice.
    """

    title: str
    digest: str
    key: str
    cached: bool
    detail: str = ""


class Steps:
    """The finished steps in a directory, which is made when it is missing.

    fresh: do not take finished steps of earlier runs. keep: leave the directory of a step that fails.
    on_failure: called with that directory before it is removed or left.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fresh: bool = False,
        keep: bool = False,
        on_failure: Callable[[Path], None] | None = None,
    ) -> None:
        self.directory = directory
        self.used: list[str] = []
        self.fresh = fresh
        self._keep = keep
        self._on_failure = on_failure

    def plan(self, title: str, inputs: Mapping[str, object], detail: str = "") -> Planned:
        """A step with these inputs: JSON-like values, which decide its result."""
        digest = hashing.of_values(inputs)
        key = f"{title}-{digest[:_KEY_DIGITS]}"
        return Planned(title, digest, key, self.finished(key), detail)

    def finished(self, key: str) -> bool:
        """Whether that step's result is there to be taken."""
        there = (self.directory / key).is_dir()
        return there and (not self.fresh or key in self.used)

    def run(self, planned: Planned, work: Callable[[Path], None]) -> Path:
        """The directory of a finished step; where there is none, `work` gets a new one to fill."""
        with progress.step(planned.title) as step:
            place = self.directory / planned.key
            if self.finished(planned.key):
                step.cached = True
                os.utime(place)
            else:
                with self._working(place) as directory:
                    work(directory)
            self.used.append(planned.key)
        return place

    def remember(self, image: str) -> None:
        """Keep the steps this run used until the image's next good build."""
        uses = self.directory / ".uses"
        uses.mkdir(exist_ok=True)
        replace(uses / f"{image}.json", json.dumps(self.used))

    def sweep(self) -> None:
        """Remove what killed runs left, and the finished steps that no image's last good build used.

        A finished step younger than a day stays: a run that failed after it will want it.
        """
        if not self.directory.is_dir():
            return
        scratch.remove_left(self.directory / _WORK)
        kept = set(self.used)
        for uses in (self.directory / ".uses").glob("*.json"):
            with contextlib.suppress(ValueError):
                kept.update(json.loads(uses.read_text()))
        for entry in self.directory.iterdir():
            if not entry.name.startswith(".") and entry.name not in kept:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime > _KEEP_SECONDS:
                        tree.remove(entry)

    @contextlib.contextmanager
    def _working(self, place: Path) -> Iterator[Path]:
        """A directory to fill, which is `place` at the end; removed on failure unless it is to be kept."""
        with contextlib.ExitStack() as stack:
            try:
                own = stack.enter_context(scratch.beside(self.directory / _WORK))
                own.chmod(0o755)
                directory = own / "made"
                directory.mkdir()
                directory.chmod(0o755)
            except OSError as error:
                raise HostError(f"cannot write in {self.directory}: {error.strerror}") from None
            try:
                yield directory
            except BaseException:
                if self._on_failure:
                    self._on_failure(directory)
                if self._keep:
                    left = self.directory / own.name.replace(_WORK, "failed", 1)
                    directory.rename(left)
                    progress.warn(f"the failed step is left in {left}")
                raise
            # With --fresh, or when another run was quicker: the new result takes the old one's place.
            if place.exists():
                place.rename(own / "old")
            directory.rename(place)
