"""A site of its own for every test, a cache that all share, and the command as a user runs it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import libc

_NEW_NS = 0x20000  # CLONE_NEWNS (linux/sched.h)
PROGRAM = [sys.executable, "-c", "from vdibuild.console import program; program.run()"]

SITE = """
images:
  small:
    family: debian
    release: trixie
    kickstart: golden-debian.ks.j2
    overlays: [golden, mine]
    disk: {size: 1GiB}
    packages: [lvm2, xfsprogs]
keys: {signing: key/signing}
"""


@dataclass
class SiteDirectory:
    """A site in a temporary directory. path: that directory. cache: where finished steps are."""

    path: Path
    cache: Path
    _running: list[subprocess.Popen[str]] = field(default_factory=list)

    def configure(self, text: str = SITE) -> None:
        """Write the site file, with the shared cache."""
        (self.path / "vdibuild.yaml").write_text(f"cache: {self.cache}\n{textwrap.dedent(text)}")

    def overlay(self, name: str, text: str) -> None:
        """Write a file of the overlay `mine`."""
        file = self.path / "overlays" / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def environment(self) -> dict[str, str]:
        """The environment of the command; TMPDIR and HOME are the site's own, and mark its processes."""
        (self.path / "tmp").mkdir(exist_ok=True)
        return {**os.environ, **self._own_environment()}

    def _own_environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.path / "tmp"), "HOME": str(self.path)}

    def start(self, *arguments: str, through: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start the command in a process group of its own, as a shell does; the log is a new one.

        through: a command that runs another one, which is given to it as its last arguments.
        """
        self._log().unlink(missing_ok=True)
        process = subprocess.Popen(
            # What a shell starts in the background is deaf to Ctrl-C, and so is what that starts in turn.
            [*through, "env", "--default-signal=INT", *PROGRAM, *arguments],
            cwd=self.path,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def run(self, *arguments: str, through: Sequence[str] = ()) -> tuple[int, str]:
        """Run the command (see `start`). Returns its exit status and all that it printed."""
        process = self.start(*arguments, through=through)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def build(self, *arguments: str) -> str:
        """Run build-golden, which has to succeed. Returns what it printed."""
        status, output = self.run("build-golden", *arguments)
        assert status == 0, output
        return output

    def take_versions(self, other: SiteDirectory) -> None:
        """Have what another site has built, and its key, without building it again."""
        for name in ("artifacts", "key"):
            shutil.copytree(other.path / name, self.path / name, symlinks=True, dirs_exist_ok=True)

    def wait_for(self, step: str, seconds: float = 300) -> None:
        """Wait until a build is at that step, by its log."""
        log = self._log()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if log.exists() and f"== {step}\n" in log.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"the build did not come to {step!r}")

    def _log(self) -> Path:
        return self.path / "artifacts" / ".logs" / "small" / "build.log"

    def running(self) -> list[str]:
        """Processes and mounts of a run."""
        found = [f"process {pid}" for pid in self._processes()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        for place in (self.path, self.cache):
            found += [line for line in mounts if f" {place}/" in line]
        return found

    def leftovers(self) -> list[str]:
        """What a run may not leave: processes, mounts, temporary files, half-made steps and versions."""
        found = self.running()
        for place in (self.path, self.cache):
            found += [str(path) for path in place.glob("**/.work-*")]
        found += [str(path) for path in (self.path / "tmp").glob("*")]
        found += [str(path) for path in self.path.glob("artifacts/*/.staging-*")]
        return found

    def wait_until_clean(self) -> list[str]:
        """Leftovers, after the kernel had time to take killed processes down."""
        return _none_of(self.leftovers)

    def wait_until_ended(self) -> list[str]:
        """What still runs, after the kernel had time to take killed processes down."""
        return _none_of(self.running)

    def versions(self) -> list[str]:
        """The published versions of the image `small`."""
        directory = self.path / "artifacts" / "small"
        return sorted(path.name for path in directory.glob("[0-9]*")) if directory.exists() else []

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _processes(self) -> list[int]:
        marks = [f"{name}={value}\0".encode() for name, value in self._own_environment().items()]
        result = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes()
                mounts = (entry / "mountinfo").read_text()
            except OSError:
                continue
            # A program of a tree has another environment, and a directory of ours as its root.
            inside = any(f"{place}/" in mounts for place in (self.path, self.cache))
            if inside or any(mark in environment for mark in marks):
                result.append(int(entry.name))
        return result


def _none_of(look: Callable[[], list[str]], seconds: float = 20) -> list[str]:
    """What is still found when that time is over."""
    end = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session", autouse=True)
def own_mounts() -> None:
    """What a process of a run mounts, no other one sees.

    The namespaces that the other makes for its guests would keep it, and what is unmounted here would neither
    be written to the image nor closed until those end.
    """
    if os.geteuid() == 0:
        libc.call("unshare", _NEW_NS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a run share (pytest-xdist gives each one of its own in it)."""
    own = tmp_path_factory.getbasetemp()
    made = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloads and finished steps that the tests of a process share."""
    return tmp_path_factory.mktemp("cache")


def small_site(path: Path, cache: Path) -> SiteDirectory:
    """A site in an existing directory, with one small image, whose bundle can also go on LVM and XFS."""
    directory = SiteDirectory(path, cache)
    directory.overlay("etc/motd", "hello\n")
    directory.configure()
    return directory


@dataclass
class Built:
    """A site whose image was built. output: what the command printed."""

    site: SiteDirectory
    output: str


def _link(source: Path, target: Path) -> None:
    """Have what another process keeps, without taking its room; what runs in one is not seen in the other."""
    target.mkdir(exist_ok=True)
    # An ordinary user's trees have files that others own, which cannot be linked.
    if os.geteuid() == 0:
        argv = ["cp", "--archive", "--link", "--no-clobber", f"{source}/.", f"{target}/"]
        subprocess.run(argv, check=True)


@pytest.fixture(scope="session")
def built(shared: Path, cache: Path) -> Iterator[Built]:
    """Booting is dear: the tests that need a version of `small` take this one's."""
    place, said, kept = shared / "built", shared / "built.output", shared / "cache"
    with (shared / "built.lock").open("w") as lock:
        # Another process of this run may be building it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if said.exists():
            site = SiteDirectory(place, cache)
            _link(kept, cache)
        else:
            place.mkdir()
            site = small_site(place, cache)
            output = site.build()
            _link(cache, kept)
            said.write_text(output)
    yield Built(site, said.read_text())
    site.close()


@pytest.fixture
def site(tmp_path: Path, cache: Path) -> Iterator[SiteDirectory]:
    """A site with one small image, whose bundle can be installed on LVM and XFS too."""
    directory = small_site(tmp_path, cache)
    yield directory
    directory.close()
