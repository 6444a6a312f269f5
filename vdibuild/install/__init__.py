"""The driver of unattended installations: a kickstart, a medium and virt-install make an installed disk.

virt-install starts the guest, which is watched here from then on: its console and the installer's log become
steps; a failure, a prompt, silence or the deadline ends it at once. That virt-install and the guest ended
well proves nothing: the caller looks for the `MARKER` on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdibuild import media, process, progress
from vdibuild.errors import CommandError, DeadlineError, InstallationError, VdibuildError
from vdibuild.install import domain, events, storage
from vdibuild.install.command import LOG_PORT, ExtraDisk, Guest, Media, command
from vdibuild.install.events import CommandEnded, Ended, Events, Output, Printed, Started
from vdibuild.install.watcher import Failure, Finding, Stage, Warned, Watcher
from vdibuild.machine import Hardware
from vdibuild.settings.images import Install, downloaded

__all__ = ["MARKER", "SCREENSHOT", "ExtraDisk", "Installed", "Job", "Media", "obtain", "run"]

MARKER = "/var/lib/vdibuild-installed"
"""The file on the installed disk that holds its installation's nonce: the kickstart came to its end."""

SCREENSHOT = "install.png"
"""The name of the picture of the screen of an installation that failed."""

_START_SECONDS = 300.0  # for virt-install to fetch and change the installer's kernel and initramfs
_LAST_WORDS_SECONDS = 2.0
_QUIET_SECONDS = 0.5
_SCRATCH = (Path("/var/lib/libvirt/boot"), Path("~/.cache/virt-manager/boot"))
"""Where virt-install puts the installer's kernel and initramfs while it starts a guest."""


@dataclass(frozen=True)
class Job:
    """An installation to be done.

    name: of the guest. uri: the libvirt connection. kickstart: its text. media: what the installer starts
    from, all of it on this host. size: of the disk, MiB. hardware: of the guest that installs. disks: what
    else the installer can read. state: the directory for what has to outlive the run. work: a directory of
    ours for temporary files, through which QEMU's user is let pass. output: the directory for the picture of
    a failure.
    """

    name: str
    uri: str
    kickstart: str
    media: Media
    size: int
    hardware: Hardware
    settings: Install
    state: Path
    work: Path
    output: Path
    disks: Sequence[ExtraDisk] = ()

    @property
    def owner(self) -> str:
        """Who makes the guest, for our mark on it: a site is known by where its state is."""
        return hashlib.sha256(os.fsencode(self.state.resolve())).hexdigest()[:16]


@dataclass(frozen=True)
class Installed:
    """What an installation left. disk: the raw disk, a file or a device. pool, volume: its names in libvirt.
    nonce: what stands in MARKER on it, if the installer came to the kickstart's end. seconds: from the
    guest's start to its end.
    """

    disk: Path
    pool: str
    volume: str
    nonce: str
    seconds: float


def obtain(settings: Install, directory: Path, cache: Path) -> Media:
    """What the site file means as an installer's medium, downloaded and verified.

    directory: of the site file, where relative paths start. cache: the directory for downloads. Raises
    VdibuildError for a medium that is missing or another one.
    """
    if settings.location is None:
        pair = (media.local(directory / str(path), None) for path in (settings.kernel, settings.initrd))
        kernel, initrd = map(str, pair)
        return Media(kernel=kernel, initrd=initrd)
    location = settings.location
    if downloaded(location):
        location = str(media.fetch(location, str(settings.sha256), cache))
    elif "://" not in location:
        location = str(media.local(directory / location, settings.sha256))
    return Media(location, settings.kernel or "", settings.initrd or "")


@contextlib.contextmanager
def run(job: Job) -> Iterator[Installed]:
    """Run an installer in a guest to its end; the disk is there for as long as the block lasts.

    A disk that is to be kept (settings.keep) stays with its machine, unless the block fails. What an earlier
    run left is removed first. Raises HostError for a domain or volume of that name that is not ours,
    and for what the host lacks; InstallationError, with the last lines, when the installation failed;
    BusyError while another run installs this name.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / SCREENSHOT).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(events.connected(job.uri))
        record = stack.enter_context(storage.recorded(job.state, job.name, job.uri))
        domain.remove_remains(connection, job.name, job.owner)
        storage.remove_remains(connection, record)
        _remove_scratch(job)
        stack.callback(_remove_scratch, job)
        emulator = media.emulator_user(connection)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{job.name}-", dir=job.work)))
        for directory in (job.work, work):
            media.admit(directory, emulator)
        pool = stack.enter_context(storage.own_pool(connection, job.name, work))
        guest, nonce = _prepare(job, work)
        media.check_access([work, *_files(guest)], emulator)
        volume = storage.create(connection, record, job.settings.pool or pool, job.name, job.size)
        kept = contextlib.ExitStack()
        stack.push(kept)
        kept.callback(storage.remove, connection, record, volume)
        kept.callback(_remove_guest, connection, job)
        guest = replace(guest, volume=f"{volume.pool}/{volume.name}")
        seconds = _install(connection, job, guest)
        if job.settings.keep:
            machine = connection.lookupByName(job.name)
            domain.finish(connection, machine, volume.path, job.settings.autostart)
        else:
            _remove_guest(connection, job)
        yield Installed(volume.path, volume.pool, volume.name, nonce, seconds)
        if job.settings.keep:
            kept.pop_all()


def _prepare(job: Job, work: Path) -> tuple[Guest, str]:
    """Put what the guest reads into the work directory. Returns the guest, and the nonce of its marker."""
    nonce = secrets.token_hex(16)
    kickstart = work / f"{job.name}.ks"
    kickstart.write_text(f"{job.kickstart.rstrip()}\n{_marker(nonce)}", encoding="utf-8")
    kickstart.chmod(0o600)
    medium = job.media
    if not medium.location:
        kernel, initrd = (work / name for name in _boot_files(job))
        kernel.symlink_to(Path(medium.kernel).resolve())
        initrd.symlink_to(Path(medium.initrd).resolve())
        medium = Media(kernel=str(kernel), initrd=str(initrd))
    elif Path(medium.location).is_file():
        iso = work / f"{job.name}.iso"
        iso.symlink_to(Path(medium.location).resolve())
        medium = replace(medium, location=str(iso))
    disks = []
    for number, disk in enumerate(job.disks):
        link = work / f"{job.name}-{number}.img"
        link.symlink_to(disk.path.resolve())
        disks.append(replace(disk, path=link))
    guest = Guest(
        name=job.name,
        owner=job.owner,
        media=medium,
        kickstart=kickstart,
        volume="",
        hardware=job.hardware,
        network=job.settings.network,
        disks=disks,
        osinfo=job.settings.osinfo or "",
        arguments=job.settings.arguments,
    )
    return guest, nonce


def _marker(nonce: str) -> str:
    """The last script of a kickstart."""
    return f"\n%post --erroronfail\nmkdir -p /var/lib\nprintf '%s\\n' {nonce} >{MARKER}\n%end\n"


def _files(guest: Guest) -> list[Path]:
    """The files that QEMU opens under the name they have on this host."""
    medium = Path(guest.media.location)
    iso = [medium] if guest.media.location and medium.is_file() else []
    return [path.resolve() for path in (*iso, *(disk.path for disk in guest.disks))]


def _remove_guest(connection: Any, job: Job) -> None:
    found = domain.find(connection, job.name)
    # Between our look at the name and now somebody else may have taken it.
    if found is not None and domain.owner(found) == job.owner:
        domain.remove(found)


def _boot_files(job: Job) -> tuple[str, str]:
    """The names of kernel and initramfs. virt-install's copies get them, by which a later run knows them:
    beside them are those of other sites, which may install a guest of the same name.
    """
    whose = f"{storage.PREFIX}{job.name}-{job.owner}"
    return f"{whose}-kernel", f"{whose}-initrd"


def _remove_scratch(job: Job) -> None:
    """Remove what a virt-install that was stopped left of kernel and initramfs."""
    for directory in _SCRATCH:
        for name in _boot_files(job):
            with contextlib.suppress(OSError):
                for path in directory.expanduser().glob(f"virtinst-*-{name}"):
                    path.unlink()


def _install(connection: Any, job: Job, guest: Guest) -> float:
    """Start the guest and watch it to its end. Returns the seconds it ran."""
    with contextlib.closing(Events(connection, job.name)) as happening:
        try:
            return _Watch(connection, job, happening).run(command(guest, job.uri))
        except (VdibuildError, KeyboardInterrupt) as error:
            picture = job.output / SCREENSHOT
            machine = domain.find(connection, job.name)
            if machine is not None and machine.isActive() and domain.screenshot(connection, machine, picture):
                said = f"its screen is in {picture}"
                if isinstance(error, VdibuildError):
                    error.hint = "\n  ".join(filter(None, (error.hint, said)))
            raise


class _Watch:
    """Starts a guest, and turns what it says into steps until it has ended or failed."""

    def __init__(self, connection: Any, job: Job, happening: Events) -> None:
        self._connection = connection
        self._job = job
        self._events = happening
        self._stage = contextlib.ExitStack()
        self._step: progress.Step | None = None
        self._argv: Sequence[str] = ()
        self._printed: deque[str] = deque(maxlen=process.TAIL_LINES)
        self._started = self._ended = False
        self._status: int | None = None
        settings = job.settings
        self._watcher = Watcher(settings.silence_seconds, settings.deadline_seconds, time.monotonic())

    def run(self, argv: Sequence[str]) -> float:
        """Run virt-install, and watch until the guest has switched itself off. Returns the seconds between.

        Raises InstallationError; CommandError when virt-install fails, DeadlineError when it hangs.
        """
        self._argv = argv
        # The last step ends here, well or not.
        with self._stage:
            self._begin("virt-install")
            with self._events.running(argv):
                self._await_command(until=lambda: self._started)
                began = self._follow()
                while not self._ended and not self._watcher.failure:
                    self._take(self._events.next(self._watcher.wait(time.monotonic())))
                    self._watcher.check(time.monotonic())
                seconds = time.monotonic() - began
                self._last_words()
                if failure := self._watcher.failure:
                    raise self._error(failure)
                # It defines the machine that it has started.
                self._await_command(until=lambda: self._status is not None)
        return seconds

    def _await_command(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + _START_SECONDS
        while not until() and self._status is None:
            if (left := end - time.monotonic()) <= 0:
                raise DeadlineError(f"virt-install did not start the guest within {_START_SECONDS:.0f} s")
            self._take(self._events.next(left))

    def _follow(self) -> float:
        """Listen to the guest that has just started. Returns the present time."""
        self._events.follow(self._connection.lookupByName(self._job.name), LOG_PORT)
        self._begin("start the installer")
        now = time.monotonic()
        settings = self._job.settings
        self._watcher = Watcher(settings.silence_seconds, settings.deadline_seconds, now)
        return now

    def _take(self, event: events.Event | None) -> None:
        match event:
            case Output(channel, data):
                lines, findings = self._watcher.feed(channel, data, time.monotonic())
                for line in lines:
                    progress.log(f"{self._job.name} {channel}| {line}")
                for finding in findings:
                    self._show(finding)
            case Started():
                self._started = True
            case Ended(by_itself, reason):
                self._ended = True
                self._drain()
                self._watcher.ended(by_itself, reason)
            case Printed(text):
                self._printed.append(text)
                progress.log(text)
            case CommandEnded(status):
                self._status = status
                if status != 0:
                    raise self._command_error(status)

    def _drain(self) -> None:
        """Take what was said before the guest ended, and arrives after it."""
        while event := self._events.next(_QUIET_SECONDS):
            self._take(event)

    def _last_words(self) -> None:
        """Go on listening for a moment: what follows a failure often says why."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        while not self._ended and (left := end - time.monotonic()) > 0:
            if (event := self._events.next(min(left, _QUIET_SECONDS))) is None:
                return
            self._take(event)

    def _show(self, finding: Finding) -> None:
        if isinstance(finding, Stage):
            self._begin(finding.name)
        elif isinstance(finding, Warned):
            progress.warn(finding.text)
        elif self._step:
            if finding.total:
                self._step.total = finding.total
                self._step.advance(finding.done - self._step.done)
            self._step.note(finding.text)

    def _begin(self, name: str) -> None:
        self._stage.close()
        self._step = self._stage.enter_context(progress.step(name))

    def _command_error(self, status: int) -> CommandError:
        said = next((line for line in self._printed if line.startswith("ERROR")), "see its last lines")
        message = f"virt-install did not start the guest: {said.removeprefix('ERROR').strip()}"
        return CommandError(self._argv, status, list(self._printed), message)

    def _error(self, failure: Failure) -> InstallationError:
        return InstallationError(
            failure.kind,
            f"the installation of {self._job.name} failed: {failure.message}",
            failure.hint,
            self._watcher.tail(),
        )
