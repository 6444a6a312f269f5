"""The bundle: a system as one archive, the same bytes for the same tree on every machine.

A pax archive made by GNU tar, compressed by zstd. It holds owners as numbers, modes, ACLs, SELinux labels,
extended attributes (file capabilities among them) and holes; hard links stay links. It does not hold the
contents of the API file systems, sockets, or when a file was read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vdibuild import archive, process, progress
from vdibuild.disk.layout import Layout
from vdibuild.errors import BundleError, CommandError
from vdibuild.tree import Tree, host_command

ARCHIVE = "bundle.tar.zst"
DESCRIPTION = "bundle.json"

_API_FILE_SYSTEMS = ("dev", "proc", "run", "sys", "tmp")
# Measured with a minimal Debian of 263 MiB, on two cores: level 3 gives 117 MiB in 1.2 s; with the long
# window level 3 gives 105 (1.2 s), level 6 102 (1.7 s), level 9 100 (2.4 s), level 12 98 (4.6 s).
_LEVEL = 6
_WINDOW_LOG = 27  # 128 MiB: the most that `zstd -d` accepts without being asked
_CHUNK = 1 << 20
_PIECE = 1 << 12
_TRUSTED_PIECE = 1 << 16  # tar writes files while the next piece is decompressed
_CHANGED = 1  # tar's status when a file changed while it was read


class Description(BaseModel):
    """What a bundle says about itself: bundle.json, beside the archive."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """The version of this format; another one is refused."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """The bundle's name."""
    os: dict[str, str]
    """The system's os-release; empty for a directory without one."""
    layout: Layout | None
    """The disk it was on, where it comes from an image."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the archive."""
    size: int
    """Bytes of the archive."""
    unpacked: int
    """Bytes of the archive without its compression: no more is ever unpacked."""


def describe(path: Path) -> Description:
    """The description in a file. Raises BundleError when it is missing or not one."""
    try:
        return description(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None


def description(data: bytes, name: str) -> Description:
    """The description in a file's bytes. name: of that file. Raises BundleError when it is none."""
    try:
        return Description.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{name} is no bundle's description: {first['loc']}: {first['msg']}") from None


def create(
    tree: Tree,
    output: Path,
    epoch: int | None,
    *,
    mounts: Sequence[str] = (),
    exclude: Sequence[str] = (),
    live: bool = False,
) -> int:
    """Write a tree's bundle to a file; returns how many bytes it has without the compression.

    epoch: no file in it is younger than this (seconds since 1970); None leaves all times as they are.
    mounts: paths of the tree where other file systems are mounted that belong to it. exclude: paths of the
    tree, which may have wildcards, that are left out. live: the system is running, so files may change while
    they are read. Raises CommandError when the tree cannot be read to its end; there is no output then.
    """
    try:
        unpacked = _create(tree, output, _tar(tree.root, epoch, mounts, exclude), live)
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    progress.note(f"{output.stat().st_size >> 20} MiB")
    return unpacked


def _create(tree: Tree, output: Path, tar_command: Sequence[str], live: bool) -> int:
    argv = host_command(tar_command)
    with output.open("wb") as file, os.fdopen(os.memfd_create("stderr"), "w+b") as messages:
        tar = process.start(argv, stderr=messages)
        try:
            unpacked, _ = _compressor().copy_stream(cast(IO[bytes], tar.stdout), file)
            status = tar.wait()
        finally:
            process.stop(tar)
        tail = process.logged(messages)
        if status != 0 and not (live and status == _CHANGED):
            raise CommandError(argv, status, tail[-process.TAIL_LINES :], f"tar could not read {tree.root}")
    return int(unpacked)


def _tar(root: Path, epoch: int | None, mounts: Sequence[str], exclude: Sequence[str]) -> list[str]:
    return [
        "tar",
        "--create",
        f"--directory={root}",
        "--format=posix",
        # The default name of a pax header contains tar's process id.
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--sort=name",
        *([f"--mtime=@{epoch}", "--clamp-mtime"] if epoch is not None else []),
        "--numeric-owner",
        *archive.ATTRIBUTES,
        # Holes by content: where a file system keeps them depends on its block size.
        "--sparse",
        "--hole-detection=raw",
        "--one-file-system",
        "--warning=no-file-ignored",  # sockets
        "--anchored",
        *(f"--exclude=./{name}/*" for name in _API_FILE_SYSTEMS),
        *(f"--exclude=./{pattern.strip('/')}" for pattern in exclude),
        ".",
        *(f"./{mount.strip('/')}" for mount in sorted(mounts)),
    ]


# Reading one that nobody has vouched for


def unpack(file: Path, directory: Path, through: archive.Through | None = None) -> None:
    """Unpack a bundle over a directory: one that is signed by somebody who is trusted, or was checked.

    through: see archive.unpack. Raises BundleError when it is damaged, and the errors of `archive.unpack`.
    """
    with progress.step("unpack the bundle"):
        archive.unpack(_decompressed(file, None, _TRUSTED_PIECE), directory, through)


def check(file: Path, *, limit: int, devices: bool = False) -> int:
    """See that a bundle is whole and harmless; returns its bytes without compression.

    limit: how many it may have. devices: device nodes are allowed; /dev's harmless ones and overlayfs's
    marks always are. Raises BundleError for a damaged archive, one that is larger, and one that reaches out
    of the directory it is unpacked into.
    """
    stream = _Stream(_decompressed(file, limit))
    rules = _Rules(file, devices)
    try:
        with tarfile.open(fileobj=cast(Any, stream), mode="r|", errorlevel=2) as tar:
            for member in tar:
                rules.check(member)
                cast(Any, tar).members = []  # it would keep them all
    except tarfile.TarError as error:
        raise BundleError(f"{file} is damaged: {error}", "get it again") from error
    stream.drain()
    return stream.position


@dataclass
class _Rules:
    """What a member of a bundle may be. links: the symbolic links so far; files: what can be linked to."""

    file: Path
    devices: bool
    links: set[tuple[str, ...]] = field(default_factory=set)
    files: set[tuple[str, ...]] = field(default_factory=set)

    def check(self, member: tarfile.TarInfo) -> None:
        """Raise BundleError for a member that unpacking must not meet."""
        path = self._path(member, member.name)
        for length in range(1, len(path)):
            if path[:length] in self.links:
                raise self._refused(member, f"lies behind the symbolic link {'/'.join(path[:length])}")
        if member.islnk():
            if self._path(member, member.linkname) not in self.files:
                raise self._refused(member, f"is a hard link to {member.linkname}, which is not in it")
        elif member.issym():
            self.links.add(path)
        elif member.isdev() and not member.isfifo() and not (self.devices or _harmless(member)):
            raise self._refused(member, f"is a device ({member.devmajor}:{member.devminor})")
        if not member.issym():
            # The same name again replaces the link.
            self.links.discard(path)
        if not member.isdir():
            self.files.add(path)

    def _path(self, member: tarfile.TarInfo, name: str) -> tuple[str, ...]:
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/"):
            raise self._refused(member, f"has an absolute name: {name}")
        if ".." in parts:
            raise self._refused(member, f"leads out of the directory: {name}")
        return parts

    def _refused(self, member: tarfile.TarInfo, reason: str) -> BundleError:
        return BundleError(
            f"{self.file}: {member.name!r} {reason}", "do not use it: no bundle of ours has such a thing"
        )


_HARMLESS = {(1, minor) for minor in (3, 5, 7, 8, 9)} | {(5, minor) for minor in (0, 1, 2)} | {(0, 0)}
"""null, zero, full, random, urandom; tty, console, ptmx; and overlayfs's mark of a removed file."""


def _harmless(member: tarfile.TarInfo) -> bool:
    return member.ischr() and (member.devmajor, member.devminor) in _HARMLESS


class _Stream:
    """Pieces of bytes as a file to read. position: how many bytes were read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""
        self.position = 0

    def read(self, size: int) -> bytes:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._left = piece
        data, self._left = self._left[:size], self._left[size:]
        self.position += len(data)
        return data

    def drain(self) -> None:
        """Read to the end: the checksum is there."""
        while self.read(_CHUNK):
            pass


def _decompressed(file: Path, limit: int | None, size: int = _PIECE) -> Iterator[bytes]:
    """A bundle's bytes without compression. Raises BundleError for a damaged or a larger one.

    size: how many bytes are read at a time. A bomb's may be many thousand times as large decompressed.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).decompressobj()
    total = 0
    try:
        with file.open("rb") as source:
            while data := source.read(size):
                if decompressor.eof:
                    raise BundleError(f"{file} is damaged: something follows its end", "get it again")
                piece = decompressor.decompress(data)
                total += len(piece)
                if limit is not None and total > limit:
                    raise BundleError(
                        f"{file} is larger than it says: more than {limit >> 20} MiB without its compression",
                        "do not use it",
                    )
                if piece:
                    yield piece
            if decompressor.unused_data:
                raise BundleError(f"{file} is damaged: something follows its end", "get it again")
    except zstandard.ZstdError as error:
        raise BundleError(f"{file} is damaged: {error}", "get it again") from error
    except FileNotFoundError:
        raise BundleError(f"{file} is missing") from None
    if not decompressor.eof:
        raise BundleError(f"{file} is cut off", "get it again")


def _compressor() -> zstandard.ZstdCompressor:
    # Any number of threads gives the same bytes, as long as there is one beside the main thread.
    threads = len(os.sched_getaffinity(0))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, threads=threads, enable_ldm=True, window_log=_WINDOW_LOG, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
