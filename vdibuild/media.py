"""Installation media: downloaded once, verified, kept in a cache; and whether QEMU's user can reach them."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import pwd
import re
import shlex
import shutil
import stat
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

from vdibuild import hashing, process, progress
from vdibuild.errors import HostError, VdibuildError

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.2
_TRIES = 6
"""How often in a row a server may fail to send a single byte; the pauses between them double."""

# Linux: include/uapi/linux/posix_acl.h and posix_acl_xattr.h; acl(5).
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_USER_OBJECT, _USER, _GROUP_OBJECT, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_SEARCH = 1

_Entries = dict[tuple[int, int | None], int]
"""Permission bits by an entry's tag and the number of its user or group."""


def fetch(url: str, sha256: str, cache: Path) -> Path:
    """The file behind a URL, from the cache where it is there already.

    sha256: what it must have; nothing else is ever put into the cache. cache: the directory, which is made.
    A download that breaks off goes on where it stopped, in this run and in the next one. Raises VdibuildError
    when the file cannot be had or is another one, HostError when there is no room for it.
    """
    if not re.match(r"https?://", url):
        raise VdibuildError(f"{url} is no http or https URL", "correct the location in the site file")
    place = cache / sha256
    file = place / (Path(unquote(urlsplit(url).path)).name or "medium")
    # A second run waits for the first one's download.
    with _alone_in(place):
        if not file.exists():
            _download(url, sha256, file)
        os.utime(place)  # when it was used last (cache.clear)
    return file


@contextlib.contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """Make a directory where there is none; within the block nobody else fetches into it or clears it."""
    lock_file = place / ".lock"
    with contextlib.ExitStack() as held:
        while True:
            place.mkdir(parents=True, exist_ok=True)
            # Whoever clears the directory removes it together with its lock: then it is made anew.
            with contextlib.suppress(FileNotFoundError):
                lock = held.enter_context(lock_file.open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(lock.fileno()), lock_file.stat()):
                    break
        yield


def local(path: Path, sha256: str | None) -> Path:
    """A medium that is on this host, verified where its SHA-256 is given. Raises VdibuildError."""
    if not path.is_file():
        raise VdibuildError(f"there is no medium {path}", "correct the location in the site file")
    if sha256 is not None:
        with progress.step("verify the medium"):
            found = hashing.of_file(path)
        if found != sha256:
            raise VdibuildError(
                f"{path} is not the medium that the site file means: its SHA-256 is {found}, not {sha256}",
                "get it again, or correct sha256 in the site file",
            )
    return path


def _download(url: str, sha256: str, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    with progress.step(f"download {file.name}") as step:
        resumed = part.exists()
        _complete(url, part, step)
        found = hashing.of_file(part)
        if found != sha256 and resumed:
            # The beginning may be of another file than the rest: the server's has changed meanwhile.
            step.note("it was begun with another file: again from the beginning")
            part.unlink()
            _complete(url, part, step)
            found = hashing.of_file(part)
        if found != sha256:
            part.unlink()
            raise VdibuildError(
                f"{url} is another file than the site file means: its SHA-256 is {found}, not {sha256}",
                "compare sha256 in the site file with what the publisher gives for this file",
            )
        part.chmod(0o644)
        part.rename(file)


def _complete(url: str, part: Path, step: progress.Step) -> None:
    """Append to a partial download until it is whole."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        problem = _append(url, part, step)
        if problem is None:
            return
        failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
        progress.log(f"{url}: {problem}")
        if failures == _TRIES:
            raise VdibuildError(
                f"{url} cannot be downloaded: {problem}",
                f"run again when the server is well; what has come is kept in {part.parent}",
            )
        time.sleep(_FIRST_PAUSE_SECONDS * 2**failures if failures else 0)


def _append(url: str, part: Path, step: progress.Step) -> str | None:
    """Ask once for what is missing. Returns None when the file is whole, else what went wrong."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 (http, https)
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # a server that knows no ranges sends it all again (RFC 9110, section 14.2)
            elif not _starts_at(answer, have):
                part.unlink()
                return "it sent another part than it was asked for"
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else None
            _check_room(part, total, have)
            step.total, step.done = total, have
            with part.open("r+b" if have else "wb") as file:
                file.seek(have)
                _copy(answer, file, step)
        if total is not None and step.done < total:
            return f"it broke off after {int(step.done)} of {total} bytes"
        return None
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return None  # there is no more: the digest will tell whether it is whole
        if error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise VdibuildError(
                f"{url} cannot be downloaded: {error.code} {error.reason}", "correct the URL in the site file"
            ) from None
        return f"{error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _starts_at(answer: Any, offset: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")


def _copy(answer: Any, file: Any, step: progress.Step) -> None:
    while data := answer.read(_CHUNK):
        file.write(data)
        step.advance(len(data))
    file.flush()
    os.fsync(file.fileno())


def _check_room(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise HostError(
            f"{part.name} needs {(total - have) >> 20} MiB, and there are {free >> 20} MiB in {part.parent}",
            "`./inv images.gc` makes room; cache in the site file chooses another place",
        )


@dataclass(frozen=True)
class User:
    """A user that a program runs as: its name, its number and all its groups."""

    name: str
    number: int
    groups: frozenset[int]


def emulator_user(connection: Any) -> User:
    """The user that QEMU runs as on a libvirt connection."""
    capabilities = ElementTree.fromstring(connection.getCapabilities())  # noqa: S314 (libvirt's own output)
    for model in capabilities.iterfind("host/secmodel"):
        label = model.findtext("baselabel") or ""
        if model.findtext("model") == "dac" and label.startswith("+"):
            # +UID:+GID
            return user(int(label.partition(":")[0]))
    return user(os.geteuid())


def user(number: int) -> User:
    """The user of that number."""
    try:
        entry = pwd.getpwuid(number)
    except KeyError:
        return User(str(number), number, frozenset())
    return User(entry.pw_name, number, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def admit(directory: Path, who: User) -> None:
    """Let a user pass through a directory of ours, and nobody else."""
    if not _may_search(directory, who):
        process.run(["setfacl", "--modify", f"user:{who.name}:x", str(directory)])


def check_access(paths: Sequence[Path], who: User) -> None:
    """See that a user can reach files: that it may search each directory on the way.

    libvirt makes the files themselves accessible while a guest uses them. Raises HostError with the command
    that mends it.
    """
    closed = dict.fromkeys(
        directory for path in paths for directory in _on_the_way(path) if not _may_search(directory, who)
    )
    if closed:
        names = " ".join(shlex.quote(str(directory)) for directory in closed)
        raise HostError(
            f"QEMU runs as {who.name}, which cannot reach {', '.join(map(str, paths))}",
            f"let it pass through: setfacl -m u:{who.name}:x {names}",
        )


def _on_the_way(path: Path) -> Iterator[Path]:
    """The directories that lead to a file, from the root on, by its name and by the links in it."""
    for way in (path.absolute(), path.resolve()):
        yield from reversed(way.parents)
        if way.is_dir():
            yield way


def _may_search(directory: Path, who: User) -> bool:
    """Whether a user may pass through a directory: the algorithm of acl(5)."""
    if who.number == 0:
        return True
    status = directory.stat()
    entries = _acl(directory, status)
    if who.number == status.st_uid:
        return _allows(entries, _USER_OBJECT)
    mask = entries.get((_MASK, None), _SEARCH)
    if (_USER, who.number) in entries:
        return bool(entries[_USER, who.number] & mask & _SEARCH)
    groups: list[tuple[int, int | None]] = [(_GROUP_OBJECT, None)] if status.st_gid in who.groups else []
    groups += [key for key in entries if key[0] == _GROUP and key[1] in who.groups]
    if groups:
        return any(entries[key] & mask & _SEARCH for key in groups)
    return _allows(entries, _OTHER)


def _allows(entries: _Entries, tag: int) -> bool:
    return bool(entries[tag, None] & _SEARCH)


def _acl(directory: Path, status: os.stat_result) -> _Entries:
    """A directory's access list; where it has none, what its mode says."""
    mode = stat.S_IMODE(status.st_mode)
    try:
        data = os.getxattr(directory, _ACL)
    except OSError:
        data = b""
    # The group's bits of the mode are the list's mask. Where they are all off, the kernel does not look at
    # the list (acl_permission_check in Linux's fs/namei.c).
    if not data or not mode & stat.S_IRWXG:
        return {(_USER_OBJECT, None): mode >> 6, (_GROUP_OBJECT, None): mode >> 3, (_OTHER, None): mode}
    (version,) = struct.unpack_from("<I", data)
    if version != _ACL_VERSION:
        raise HostError(f"the access list of {directory} is of the unknown version {version}")
    entries: _Entries = {}
    for tag, permissions, number in struct.iter_unpack("<HHI", data[4:]):
        entries[tag, number if tag in (_USER, _GROUP) else None] = permissions
    return entries
