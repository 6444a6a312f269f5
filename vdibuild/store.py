"""Keeps the versions of images: published in one rename, signed, promoted, rolled back, cleared away.

    ARTIFACTS/IMAGE/VERSION/          a version: its files read-only, its name YYYYMMDD.N (UTC)
    ARTIFACTS/IMAGE/current           a link to the promoted version
    ARTIFACTS/IMAGE/.promotions.json  which versions were promoted, the oldest first
    ARTIFACTS/IMAGE/.staging-VERSION/ a version being made; belongs to whoever holds .build.lock
    ARTIFACTS/IMAGE/.removing-VERSION/ a version being removed; belongs to whoever holds .lock

SHA256SUMS (as sha256sum writes it) covers every other file of a version, and SHA256SUMS.sig signs it. A
process that is killed leaves at most a directory whose name begins with a dot; the next build, or `gc`,
removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vdibuild import manifest, process, progress, signature
from vdibuild.errors import BusyError, CommandError, HostError, StoreError
from vdibuild.live import ISO
from vdibuild.manifest import AdoptedManifest, AnyManifest, LiveManifest, Manifest, Stored, StoredFile
from vdibuild.output import replace, sync
from vdibuild.settings.keys import Keys

DISK = "disk.qcow2"
BUNDLE = "bundle.tar.zst"
SBOM = "sbom.spdx.json"
SCREENSHOT = "boot.png"
LOG = "build.log"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"

_BUILD_LOCK = ".build.lock"
_LOCK = ".lock"
_STAGING = ".staging-"
_REMOVING = ".removing-"
_CURRENT = "current"
_HISTORY = ".promotions.json"
_CHUNK = 1 << 20
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Version:
    """A stored version. name: YYYYMMDD.N. path: its directory. promoted: it is the current one."""

    image: str
    name: str
    path: Path
    promoted: bool

    def stored(self) -> AnyManifest:
        """What it says about itself. Raises StoreError when that is missing or damaged."""
        return manifest.read(self.path / manifest.NAME)

    def described(self) -> Manifest | LiveManifest:
        """What a version that was built says. Raises StoreError as `stored`, or for an adopted machine."""
        stored = self.stored()
        if isinstance(stored, AdoptedManifest):
            raise StoreError(
                f"{self.image} {self.name} was adopted: nobody knows what is in it", "it can only be cloned"
            )
        return stored

    def manifest(self) -> Manifest:
        """What a version with a disk says about itself. Raises StoreError as `described`, or for an ISO."""
        described = self.described()
        if not isinstance(described, Manifest):
            raise StoreError(f"{self.image} {self.name} is a live system: it has no disk")
        return described

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return _size(self.path)


@dataclass(frozen=True)
class Staging:
    """A version being made: put its files into the directory `path`, then publish it."""

    image: str
    version: str
    path: Path


@dataclass(frozen=True)
class Verified:
    """A version whose every byte was checked. signer: who signed it. size: bytes read."""

    version: Version
    signer: str
    size: int


@dataclass(frozen=True)
class Collected:
    """What `gc` did with a version or leftover. removed: it is gone. reason: why it was kept or removed."""

    image: str
    name: str
    size: int
    removed: bool
    reason: str


class Store:
    """The versions below the directory `artifacts`, which is made when the first one is built.

    keys: who signs them, and whose signatures count.
    """

    def __init__(self, artifacts: Path, keys: Keys) -> None:
        self.artifacts = artifacts
        self.keys = keys

    def images(self) -> list[str]:
        """The names of the images that have a version here, sorted."""
        if not self.artifacts.is_dir():
            return []
        names = [entry.name for entry in self.artifacts.iterdir() if _IMAGE_NAME.fullmatch(entry.name)]
        return sorted(name for name in names if self._names(name))

    def versions(self, image: str) -> list[Version]:
        """The versions of an image, the oldest first."""
        promoted = self._promoted(image)
        return [self._version(image, name, promoted) for name in self._names(image)]

    def get(self, image: str, version: str | None = None) -> Version:
        """A version of an image; by default the promoted one. Raises StoreError when there is none."""
        names = self._names(image)
        promoted = self._promoted(image)
        name = version if version is not None else promoted
        if name is None:
            there = ", ".join(names)
            raise StoreError(
                f"no version of {image} is promoted",
                f"promote one of {there}" if there else f"build it: build-golden --image {image}",
            )
        if name not in names:
            raise StoreError(f"{image} has no version {name}", f"there are: {', '.join(names) or 'none'}")
        return self._version(image, name, promoted)

    def labelled(self, image: str, label: str) -> Version:
        """The version of a live system whose medium has that label. Raises StoreError when there is none."""
        for version in reversed(self.versions(image)):
            described = version.stored()
            if isinstance(described, LiveManifest) and described.label == label:
                return version
        raise StoreError(
            f"no version of {image} here has the label {label}", "name the ISO that it was made from: --image"
        )

    def next_version(self, image: str) -> str:
        """The name of the next version: today's date in UTC and a number, after every one that is there."""
        today = datetime.now(UTC).strftime("%Y%m%d")
        date, number = max(map(_order, self._names(image)), default=(today, 0))
        # A clock that was set back must not make a version that sorts before its elders.
        return f"{today}.1" if today > date else f"{date}.{number + 1}"

    @contextlib.contextmanager
    def staging(self, image: str) -> Iterator[Staging]:
        """A new version's directory, on the store's own file system; removed unless it was published.

        Only one run at a time may have one for an image. Raises BusyError naming the process that has it;
        HostError when the store cannot be written or, at any time within the block, is full.
        """
        directory = self._directory(image)
        with _host_errors(self.artifacts):
            directory.mkdir(parents=True, exist_ok=True)
            with _lock(directory / _BUILD_LOCK, f"another run is building {image}", patience=0):
                for leftover in _marked(directory, _STAGING):
                    shutil.rmtree(leftover)
                version = self.next_version(image)
                path = directory / f"{_STAGING}{version}"
                path.mkdir(mode=0o755)
                try:
                    # Within the removal below, so that what is said of the free space is so.
                    with _host_errors(directory):
                        yield Staging(image, version, path)
                finally:
                    if path.exists():
                        shutil.rmtree(path)

    def publish(self, staging: Staging, described: Stored) -> Version:
        """Make a finished version visible, in one rename; it is not promoted.

        described: the manifest; the files and their sums are added to it. On return everything is on the
        disk itself. Raises StoreError when what is in the directory cannot be published.
        """
        if (described.image, described.version) != (staging.image, staging.version):
            raise StoreError(f"the manifest of {staging.image} {staging.version} names another version")
        path = staging.path
        names = _regular_files(path)
        for name in (manifest.NAME, SUMS, SIGNATURE):
            if name in names:
                raise StoreError(f"{path / name} is there already")
        sums = _sums(path, names)
        files = {name: StoredFile(size=(path / name).stat().st_size, sha256=sums[name]) for name in names}
        manifest.write(described.model_copy(update={"files": files}), path / manifest.NAME)
        sums |= _sums(path, [manifest.NAME])
        text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        (path / SUMS).write_text(text, encoding="ascii")
        (path / SIGNATURE).write_text(signature.sign(text, self.keys), encoding="ascii")
        for name in _regular_files(path):
            (path / name).chmod(0o444)
            sync(path / name)
        path.chmod(0o755)
        sync(path)
        directory = path.parent
        with self._changing(staging.image):
            place = directory / staging.version
            if place.exists():
                raise StoreError(f"{place} is there already")
            path.rename(place)
            sync(directory)
        return self._version(staging.image, staging.version, self._promoted(staging.image))

    @contextlib.contextmanager
    def using(self, image: str, version: str | None = None) -> Iterator[Version]:
        """A version (by default the promoted one) that `gc` leaves alone for as long as the block runs."""
        found = self.get(image, version)
        with _shared(found):
            yield found

    def verify(self, image: str, version: str | None = None) -> Verified:
        """Check every byte of a version (by default the promoted one): signature, sums, manifest, disk.

        Raises StoreError naming everything that is damaged, missing or too much.
        """
        with self.using(image, version) as found:
            signer, sums = self._signed(found)
            path = found.path
            size = found.size
            with progress.step(f"verify {image} {found.name}", total=size) as step:
                actual = _sums(path, sums, step)
                damaged = [name for name, digest in sums.items() if actual[name] != digest]
                if damaged:
                    raise StoreError(
                        f"{path} is damaged: {', '.join(damaged)}", "promote or build another version"
                    )
                described = self._described(found, sums)
                if not isinstance(described, LiveManifest):
                    _check_disk(path / DISK, described.virtual_size)
            return Verified(found, signer, size)

    def trust(self, version: Version, *names: str) -> Manifest:
        """Check the signature of a version with a disk, its manifest, and every byte of these files of it.

        Returns the manifest. Raises StoreError as `verify`, and for a live system.
        """
        signer, sums = self._signed(version)
        size = sum((version.path / name).stat().st_size for name in names)
        with progress.step(f"verify {version.image} {version.name}", total=size) as step:
            actual = _sums(version.path, [manifest.NAME, *names], step)
            damaged = [name for name, digest in actual.items() if sums.get(name) != digest]
            if damaged:
                raise StoreError(
                    f"{version.path} is damaged: {', '.join(damaged)}", "promote or build another version"
                )
            self._described(version, sums)
            step.note(f"signed by {signer}")
        return version.manifest()

    def promote(self, image: str, version: str) -> Version:
        """Make a version the current one, after a check of its signature and files, not of every byte.

        Raises StoreError when it does not stand that.
        """
        with self.using(image, version) as found, self._changing(image):
            self._check(found)
            history = self._history(image)
            if history[-1:] != [version]:
                self._remember(image, [*history, version])
                self._point(image, version)
        return self.get(image, version)

    def rollback(self, image: str) -> Version:
        """Make the version current that was promoted before; again, the one before that.

        Raises StoreError when there is none, or when it is damaged (see `promote`).
        """
        with self._changing(image):
            history = self._history(image)
            if len(history) < 2:
                raise StoreError(
                    f"no earlier promoted version of {image} is left",
                    f"promote another one: {', '.join(self._names(image)) or 'there is none'}",
                )
            self._check(self.get(image, history[-2]))
            self._point(image, history[-2])
            self._remember(image, history[:-1])
        return self.get(image)

    def gc(self, image: str | None = None, keep: int = 3) -> list[Collected]:
        """Remove old versions, and what killed runs left, of one image or of all.

        keep: how many of the newest versions stay, at least 1. The promoted version, the one a rollback
        would return to, and those in use stay whatever their age. Returns what stays and what went.
        """
        if keep < 1:
            raise StoreError("gc keeps at least the newest version", "give keep=1 or more")
        if image is None:
            # Also where there is no version yet: the first build may have been killed.
            built = sorted(lock.parent.name for lock in self.artifacts.glob(f"*/{_BUILD_LOCK}"))
        else:
            built = [image]
        return [entry for name in built for entry in self._collect(name, keep)]

    def _collect(self, image: str, keep: int) -> list[Collected]:
        directory = self._directory(image)
        result = []
        with self._changing(image):
            with contextlib.suppress(BusyError), _lock(directory / _BUILD_LOCK, "", patience=0):
                for path in _marked(directory, _STAGING):
                    result.append(_remove(image, path, "left by a killed run"))
            result += [_remove(image, path, "left by a killed run") for path in _marked(directory, _REMOVING)]
            history = self._history(image)
            reasons = dict.fromkeys(self._names(image)[-keep:], "new")
            reasons |= dict.fromkeys(history[-2:-1], "for a rollback")
            reasons |= dict.fromkeys(history[-1:], "promoted")
            for version in self.versions(image):
                if version.name in reasons:
                    entry = Collected(image, version.name, version.size, False, reasons[version.name])
                else:
                    entry = _remove_unused(version)
                result.append(entry)
        return result

    def _directory(self, image: str) -> Path:
        if not _IMAGE_NAME.fullmatch(image):
            raise StoreError(f"{image!r} is no name of an image")
        return self.artifacts / image

    def _names(self, image: str) -> list[str]:
        directory = self._directory(image)
        if not directory.is_dir():
            return []
        entries = (entry for entry in directory.iterdir() if _VERSION_NAME.fullmatch(entry.name))
        return sorted((entry.name for entry in entries if entry.is_dir()), key=_order)

    def _version(self, image: str, name: str, promoted: str | None) -> Version:
        return Version(image, name, self._directory(image) / name, name == promoted)

    def _promoted(self, image: str) -> str | None:
        try:
            target = str((self._directory(image) / _CURRENT).readlink())
        except FileNotFoundError:
            return None
        except OSError:
            raise StoreError(f"{self._directory(image) / _CURRENT} is not a link", "remove it") from None
        if not _VERSION_NAME.fullmatch(target):
            raise StoreError(
                f"{self._directory(image) / _CURRENT} leads to {target}, which is no version", "remove it"
            )
        return target

    def _history(self, image: str) -> list[str]:
        """The promoted versions that are still there, ending with the current one."""
        try:
            history = json.loads((self._directory(image) / _HISTORY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            history = []
        except ValueError:
            raise StoreError(
                f"{self._directory(image) / _HISTORY} is damaged", "remove it: what is promoted stays so"
            ) from None
        promoted = self._promoted(image)
        if promoted is None:
            return []
        # The link decides: a run that was killed may have written one and not the other.
        if promoted in history:
            history = history[: len(history) - history[::-1].index(promoted)]
        else:
            history.append(promoted)
        there = self._names(image)
        return [name for name in history if name in there]

    def _remember(self, image: str, history: list[str]) -> None:
        replace(self._directory(image) / _HISTORY, json.dumps(history) + "\n")

    def _point(self, image: str, version: str) -> None:
        directory = self._directory(image)
        beside = directory / f".{_CURRENT}.new"
        beside.unlink(missing_ok=True)
        beside.symlink_to(version)
        beside.rename(directory / _CURRENT)
        sync(directory)

    @contextlib.contextmanager
    def _changing(self, image: str) -> Iterator[None]:
        """Hold the lock under which an image's versions come, go and are promoted: for moments only."""
        directory = self._directory(image)
        if not directory.is_dir():
            raise StoreError(f"there is no image {image} in {self.artifacts}")
        with (
            _host_errors(self.artifacts),
            _lock(directory / _LOCK, f"another run is changing {image}", patience=_PATIENCE_SECONDS),
        ):
            yield

    def _signed(self, version: Version) -> tuple[str, dict[str, str]]:
        """Who signed a version, and the sums they signed, of exactly the files that are there."""
        path = version.path
        signer = signature.verify(path / SUMS, path / SIGNATURE, self.keys)
        sums = _read_sums(path / SUMS)
        there = set(_regular_files(path))
        expected = {*sums, SUMS, SIGNATURE}
        wrong = [f"{name} is missing" for name in sorted(expected - there)]
        wrong += [f"{name} does not belong there" for name in sorted(there - expected)]
        if wrong:
            raise StoreError(f"{path}: {', '.join(wrong)}", "promote or build another version")
        return signer, sums

    def _described(self, version: Version, sums: Mapping[str, str]) -> AnyManifest:
        """A version's manifest, if it agrees with where it is, with the sums and with the sizes."""
        if manifest.NAME not in sums:
            raise StoreError(f"{version.path} has no {manifest.NAME}")
        described = version.stored()
        if (described.image, described.version) != (version.image, version.name):
            # Signed as another version: an old one that was put in a newer one's place.
            raise StoreError(f"{version.path} holds {described.image} {described.version}")
        listed = {name: file.sha256 for name, file in described.files.items()}
        if listed != {name: digest for name, digest in sums.items() if name != manifest.NAME}:
            raise StoreError(f"{version.path}: {manifest.NAME} and {SUMS} list different files")
        for name, file in described.files.items():
            if (version.path / name).stat().st_size != file.size:
                raise StoreError(f"{version.path} is damaged: {name} has not its size")
        return described

    def _check(self, version: Version) -> None:
        _, sums = self._signed(version)
        if _sums(version.path, [manifest.NAME])[manifest.NAME] != sums.get(manifest.NAME):
            raise StoreError(f"{version.path} is damaged: {manifest.NAME}")
        self._described(version, sums)


_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)  # as settings.values.Name
_VERSION_NAME = re.compile(r"\d{8}\.[1-9]\d*", re.ASCII)
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)", re.ASCII)


def _order(version: str) -> tuple[str, int]:
    date, number = version.split(".")
    return date, int(number)


def _size(path: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path))


def _marked(directory: Path, mark: str) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if entry.name.startswith(mark))


def _regular_files(path: Path) -> list[str]:
    """The names in a directory. Raises StoreError for anything that is not a regular file."""
    names = []
    for entry in os.scandir(path):
        if not entry.is_file(follow_symlinks=False):
            raise StoreError(f"{entry.path} is not a regular file")
        names.append(entry.name)
    return sorted(names)


def _sums(
    path: Path, names: Mapping[str, str] | list[str], step: progress.Step | None = None
) -> dict[str, str]:
    """SHA-256 by name, several files at a time."""

    def digest(name: str) -> str:
        result = hashlib.sha256()
        with (path / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                result.update(chunk)
                if step:
                    step.advance(len(chunk))
        return result.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _read_sums(path: Path) -> dict[str, str]:
    sums = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        match = _SUMS_LINE.fullmatch(line)
        if not match:
            raise StoreError(f"{path}:{number}: not a line of sha256sum")
        sums[match[2]] = match[1]
    return sums


def _check_disk(path: Path, virtual_size: int) -> None:
    """Ask qemu-img whether an image is sound, as large as it should be, and refers to no other file."""
    said = process.run(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)], capture=True)
    info = json.loads(said.stdout)
    if "backing-filename" in info or "data-file" in info.get("format-specific", {}).get("data", {}):
        raise StoreError(f"{path} refers to another file", "it must be an image on its own")
    if info["virtual-size"] != virtual_size:
        raise StoreError(f"{path} has {info['virtual-size']} bytes, its manifest says {virtual_size}")
    try:
        process.run(["qemu-img", "check", "-U", "-f", "qcow2", str(path)])
    except CommandError as error:
        raise StoreError(f"{path} is damaged: {' '.join(error.tail[:2])}", "build it again") from None


@contextlib.contextmanager
def _shared(version: Version) -> Iterator[None]:
    """Hold a shared lock on a version's directory. Raises StoreError when it was removed meanwhile."""
    try:
        descriptor = os.open(version.path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise StoreError(f"{version.image} {version.name} was just removed") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not version.path.exists():
            raise StoreError(f"{version.image} {version.name} was just removed")
        yield
    finally:
        os.close(descriptor)


def _remove_unused(version: Version) -> Collected:
    """Remove a version, unless it is in use."""
    size = version.size
    descriptor = os.open(version.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Collected(version.image, version.name, size, False, "in use")
        if any(_open_in_qemu(version.path / name) for name in (DISK, ISO)):
            return Collected(version.image, version.name, size, False, "in use by a machine")
        aside = version.path.with_name(f"{_REMOVING}{version.name}")
        version.path.rename(aside)
        shutil.rmtree(aside)
        return Collected(version.image, version.name, size, True, "old")
    finally:
        os.close(descriptor)


def _open_in_qemu(disk: Path) -> bool:
    """Whether a QEMU, of any user, has an image open: it holds locks on bytes of it (qemu:file-posix.c).

    That is so for backing files too. The question needs no right to see that process, as /proc would.
    """
    try:
        with disk.open("rb") as file:
            # struct flock: type, whence, start, length (0: to the end), pid
            ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, ask)
    except FileNotFoundError:
        return False
    kind: int = struct.unpack_from("h", answer)[0]
    return kind != fcntl.F_UNLCK


def _remove(image: str, path: Path, reason: str) -> Collected:
    size = _size(path)
    shutil.rmtree(path)
    return Collected(image, path.name, size, True, reason)


@contextlib.contextmanager
def _lock(path: Path, message: str, *, patience: float) -> Iterator[None]:
    """Hold the lock on a file, which names its holder's process. patience: seconds to wait for it."""
    end = time.monotonic() + patience
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise BusyError(
                        f"{message} (process {holder})", "wait for it, or end it, and run this again"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _host_errors(directory: Path) -> Iterator[None]:
    """Tell what the host lacks below a directory, space or permission, whoever met it within the block."""
    hint = "remove old versions: images.gc; or set artifacts in the site file"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = Path(error.filename).parent if error.filename else directory
            raise HostError(f"no space left in {full} ({_free(full)} free)", hint) from error
        where = Path(error.filename or directory)
        ours = where == directory or directory in where.parents or where in directory.parents
        if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise HostError(
                f"cannot write {where}: {error.strerror}",
                "run this as the owner of the store, or set artifacts in the site file",
            ) from error
        raise
    except CommandError as error:
        if any(os.strerror(errno.ENOSPC) in line for line in error.tail):
            raise HostError(
                f"{error.argv[0]} found no space left; {directory} has {_free(directory)} free", hint
            ) from error
        raise


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free >> 20} MiB"
