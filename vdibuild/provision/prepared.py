"""Stored disks without their compression, so that a new machine's costs no more than copying its bytes.

    CACHE/disks/SHA256/disk.raw     the disk, with holes where nothing is; SHA256 is the stored qcow2's
    CACHE/disks/SHA256/pieces.json  where there is something, and the CRC-32 of each piece of that

What is checked before a byte of it gets to a machine, and why that is enough:

1. The version's signature, over the sums of its files; so SHA256 is what a signer vouched for. This is done
   for each machine (Store.trust).
2. The qcow2 has that sum. This is done when the disk is prepared, on a copy that nobody else can write, and
   it is that copy which is decompressed: no time passes between the check and the use in which the stored
   file could be another one.
3. The prepared disk is what was made then, because nobody else could change it: it is in a directory that
   belongs to the user who runs this, and that nobody else can enter or ever could. That is asked of the open
   directory, for each machine, and its files are opened through it. Whoever can write there is that user, or
   root, and needs no image to become so. No sum would help against them: they could write that as well.
4. The host's disk has not damaged it meanwhile: each piece has the CRC-32 that was written down. A piece is
   read into memory once, summed there, and written to the volume from there. This is done for each machine. A
   SHA-256 would find the same, and take as long as all the copying does.

The stored qcow2 is not read again: if it is damaged later, the machines that are made from here are not.
A prepared disk that is damaged is made again. Those whose version is gone from the store are removed when the
next one is prepared, and by `images.gc`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vdibuild import progress, tree
from vdibuild.disk import zeros
from vdibuild.disk.image import Image
from vdibuild.errors import StoreError
from vdibuild.manifest import Digest
from vdibuild.output import unfinished
from vdibuild.scratch import beside
from vdibuild.store import Store

_DISK = "disk.raw"
_PIECES = "pieces.json"
_CHUNK = 1 << 20
"""Bytes of a piece at most: few enough to stay in a processor's cache between sum and writing."""
_AT_ONCE = 8
"""How many pieces are on their way at once: enough for a device to have some of them always."""
_ALIGNED = 4096
"""What O_DIRECT wants positions to be multiples of, in bytes: the largest block of any disk."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Piece(_Model):
    """A part of the disk that holds something; in bytes."""

    start: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(gt=0, le=_CHUNK)]
    crc32: int


class _Pieces(_Model):
    """All parts of a disk that hold something, in their order. disk: the stored one's sum. size: in bytes."""

    disk: Digest
    size: int
    pieces: list[_Piece]


class _DamagedError(Exception):
    """The prepared disk is not what it was."""


@dataclass(frozen=True)
class PreparedDisks:
    """The prepared disks of a store's versions, in a directory that is made when the first one is."""

    directory: Path
    store: Store

    def copy(self, stored: Path, digest: str, volume: Path, *, blank: bool = True) -> None:
        """Copy a stored disk to a volume, which is a raw file that is all holes, or a block device.

        stored: the qcow2, prepared first where it is not yet; digest: its SHA-256, from a signed manifest.
        blank: the volume holds nothing but zeros.
        Raises StoreError when the stored disk is not what was signed, HostError when there is no room to
        prepare it.
        """
        place = self.directory / digest
        for _ in range(2):
            if not place.exists():
                with progress.step("prepare the disk (once for each version)"):
                    for gone in self.unneeded():
                        tree.remove(gone)
                    self._prepare(stored, digest)
            try:
                _copy(place, digest, volume, blank=blank)
            except (_DamagedError, FileNotFoundError) as error:
                progress.warn(f"{place} is damaged and is made again: {error}")
                tree.remove(place)
            else:
                return
        raise StoreError(f"{place} cannot be read back as it was written", "is the host's disk in order?")

    def _prepare(self, stored: Path, digest: str) -> None:
        place = self.directory / digest
        with beside(place) as scratch:
            compressed, staging = scratch / stored.name, scratch / digest
            staging.mkdir(mode=0o700)
            raw = staging / _DISK
            with unfinished(compressed):
                _copy_checked(stored, compressed, digest)
                image = Image(compressed, scratch)
                image.cut([(0, image.size)], raw)
                (staging / _PIECES).write_text(_summed(raw, digest).model_dump_json(), encoding="ascii")
            try:
                staging.rename(place)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another run was as far
                    raise

    def unneeded(self) -> list[Path]:
        """The prepared disks whose version is gone from the store."""
        versions = [version for image in self.store.images() for version in self.store.versions(image)]
        wanted = set()
        for version in versions:
            with contextlib.suppress(StoreError):  # a damaged one, which nobody can use
                wanted |= {file.sha256 for file in version.described().files.values()}
        return [entry for entry in sorted(self.directory.glob("?" * 64)) if entry.name not in wanted]


def _copy_checked(stored: Path, copy: Path, digest: str) -> None:
    """Copy a file. Raises StoreError when what was copied has not that SHA-256."""
    actual = hashlib.sha256()
    with stored.open("rb") as source, copy.open("xb") as target:
        while data := source.read(_CHUNK):
            actual.update(data)
            target.write(data)
    if actual.hexdigest() != digest:
        raise StoreError(f"{stored.parent} is damaged: {stored.name}", "promote or build another version")


def _summed(raw: Path, digest: str) -> _Pieces:
    """The pieces of a raw disk, with their sums."""
    with raw.open("rb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:

        def piece(place: tuple[int, int]) -> _Piece:
            start, length = place
            data = os.pread(file.fileno(), length, start)
            return _Piece(start=start, length=length, crc32=zlib.crc32(data))

        size = os.fstat(file.fileno()).st_size
        return _Pieces(disk=digest, size=size, pieces=list(pool.map(piece, _data(file.fileno(), size))))


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file holds data: start and length of pieces, in bytes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        for position in range(start, end, _CHUNK):
            yield position, min(_CHUNK, end - position)


def _copy(place: Path, digest: str, volume: Path, *, blank: bool) -> None:
    """Copy a prepared disk. Raises _DamagedError or FileNotFoundError when it has to be made again."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _check_owner(place, os.fstat(directory))
        described = _read(directory, digest)
        raw = os.open(_DISK, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    finally:
        os.close(directory)
    with os.fdopen(raw, "rb") as source, _opened(volume, described) as target:
        total = sum(piece.length for piece in described.pieces)
        with progress.step("copy the disk", total=total) as step:
            if not blank:
                _zero_holes(target.fileno(), described)

            own = threading.local()  # each thread's memory, which need not be got anew for each piece

            def copy(piece: _Piece) -> None:
                if not hasattr(own, "memory"):
                    own.memory = memoryview(mmap.mmap(-1, _CHUNK))  # begins with a page, as O_DIRECT wants
                data = own.memory[: piece.length]
                read = os.preadv(source.fileno(), [data], piece.start)
                if read != piece.length or zlib.crc32(data) != piece.crc32:
                    raise _DamagedError(f"{piece.length} bytes from {piece.start} are not as they were")
                _write(target.fileno(), data, piece.start)
                step.advance(piece.length)

            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for _ in pool.map(copy, described.pieces):
                    pass


def _opened(volume: Path, described: _Pieces) -> BinaryIO:
    """A volume to write to: past the page cache, where the file system lets us.

    What a machine is going to read, it reads itself; here, the cache would cost a copy of all, and memory
    that the host's machines need.
    """
    if all(piece.start % _ALIGNED == piece.length % _ALIGNED == 0 for piece in described.pieces):
        with contextlib.suppress(OSError):  # EINVAL: as on tmpfs
            return os.fdopen(os.open(volume, os.O_RDWR | os.O_DIRECT), "r+b", buffering=0)
    return volume.open("r+b", buffering=0)


def _check_owner(place: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise StoreError(
            f"{place} can be changed by others than the user who runs this",
            "remove it; and see who can write to the cache: of the site file",
        )


def _read(directory: int, digest: str) -> _Pieces:
    file = os.open(_PIECES, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    with os.fdopen(file, "rb") as reader:
        try:
            described = _Pieces.model_validate_json(reader.read())
        except ValidationError as error:
            raise _DamagedError(f"{_PIECES}: {error.errors()[0]['msg']}") from None
    if described.disk != digest:
        raise _DamagedError(f"it is {described.disk}")
    return described


def _zero_holes(device: int, described: _Pieces) -> None:
    """Let a block device hold zeros where the disk has holes: its file systems rely on them."""
    end = 0
    for start, following in (
        *((piece.start, piece.start + piece.length) for piece in described.pieces),
        (described.size, described.size),
    ):
        if start > end:
            zeros.write(device, end, start - end)
        end = following


def _write(descriptor: int, left: memoryview, start: int) -> None:
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written
