"""Writes an image to cards or sticks, and reads all of it back from the cards themselves.

Worn and counterfeit cards take what is written without a word, and lose it; the kernel's caches would hide
that. So all goes past them (O_DIRECT), and is compared range by range. The image's beginning, with its boot
sector and partition table, is written last: a card that was not finished does not start. Several cards are
written at once, in a thread each, and each for itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import hashlib
import json
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vdibuild import process, progress
from vdibuild.errors import VdibuildError
from vdibuild.station import Span

_RANGE = 4 << 20  # bytes that are written, read and compared as one
_SECTOR = 512
_BLKFLSBUF = 0x1261  # linux/fs.h: write a block device's buffers, and forget them
_PART_TYPES = ("part", "disk", "loop")
_T = TypeVar("_T")

_COLUMNS = "PATH,TYPE,MODEL,SERIAL,SIZE,RM,HOTPLUG,RO,TRAN,MOUNTPOINTS"


@dataclass(frozen=True)
class Card:
    """A block device, as lsblk(8) tells of it. size: bytes. used: why it is in use, or empty."""

    path: Path
    model: str
    serial: str
    size: int
    removable: bool
    protected: bool
    used: str

    def __str__(self) -> str:
        gigabytes = self.size / 1e9
        return (
            f"{self.path}: {self.model or 'no model'}, {gigabytes:.1f} GB, serial {self.serial or 'unknown'}"
        )


def candidates(size: int) -> list[Card]:
    """The cards that an image of so many bytes can be written to."""
    return [card for card in _cards([]) if not refusal(card, size, internal=False)]


def find(device: Path) -> Card:
    """The card behind a device. Raises VdibuildError for what is no whole block device."""
    try:
        is_device = stat.S_ISBLK(device.stat().st_mode)
    except OSError as error:
        raise VdibuildError(f"{device}: {error.strerror}", "`./inv kiosk.cards` lists them") from None
    if not is_device:
        raise VdibuildError(f"{device} is no block device", "`./inv kiosk.cards` lists them")
    found = _cards([str(device.resolve())])
    if not found:
        raise VdibuildError(f"{device} is a part of a device", "name the whole one")
    return found[0]


def refusal(card: Card, size: int, *, internal: bool) -> str:
    """Why nothing is written to a card, or empty. size: of the image. internal: one that stays is meant."""
    if card.used:
        return f"it is in use: {card.used}"
    if card.protected:
        return "it is write-protected: push its switch away from LOCK"
    if not card.removable and not internal:
        return "it cannot be taken out: is it this machine's disk? --internal writes to it all the same"
    if card.size < size:
        return f"it is too small: {card.size / 1e6:.0f} MB, and the image has {size / 1e6:.0f} MB"
    return ""


def _cards(devices: Sequence[str]) -> list[Card]:
    argv = ["lsblk", "--json", "--bytes", "--output", _COLUMNS, *devices]
    listed = json.loads(process.run(argv, capture=True).stdout)["blockdevices"]
    return [
        Card(
            path=Path(one["path"]),
            model=(one["model"] or "").strip(),
            serial=(one["serial"] or "").strip(),
            size=one["size"],
            # A reader on PCI says that it can be unplugged, a USB one that its medium can be removed.
            removable=one["rm"] or one["hotplug"] or one["tran"] in ("usb", "mmc"),
            protected=one["ro"],
            used=_use(one),
        )
        for one in listed
        if one["type"] in ("disk", "loop") and one["size"]
    ]


def _use(device: Mapping[str, Any]) -> str:
    """What a device, or anything on it, is used for."""
    for place in device["mountpoints"]:
        if place:
            return f"{device['path']} is " + ("swap" if place == "[SWAP]" else f"mounted at {place}")
    if device["type"] not in _PART_TYPES:
        return f"{device['path']} ({device['type']}) is active on it"
    return next(filter(None, map(_use, device.get("children", ()))), "")


class _StoppedError(Exception):
    """Another thread has been told to stop."""


@dataclass
class _Writing:
    """A card that is being written. length: of the image, in bytes. written: bytes that are on the card, so
    far. state: what the card now is.
    """

    image: Path
    card: Path
    replaced: Mapping[Span, bytes]
    length: int
    written: int = 0
    state: str = "is as it was"

    def run(self, stopping: threading.Event) -> None:
        """Write the image, and compare all that the card then holds."""
        try:
            self._run(stopping)
        except OSError as error:
            raise VdibuildError(
                f"{self.card} failed after {self.written >> 20} MiB: {error.strerror}",
                "it does not hold the image; take another card",
            ) from None

    def _run(self, stopping: threading.Event) -> None:
        length, card = self.length, self.card
        digests: dict[int, bytes] = {}
        # Past the caches: what counts as written is on the card, for the bar and for errors.
        with self.image.open("rb") as source, _opened(card, os.O_RDWR | os.O_DIRECT) as target:

            def content(start: int) -> tuple[int, bytes, bytes]:
                data = _content(source.fileno(), start, length, self.replaced)
                return start, data, hashlib.sha256(data).digest()

            with progress.step(f"write {card}", total=length) as step, mmap.mmap(-1, _RANGE) as page:
                self._count(0)
                _put(target, 0, page, min(_RANGE, length))
                os.fdatasync(target)
                for start, data, digest in _ahead(content, [*range(_RANGE, length, _RANGE), 0]):
                    if stopping.is_set():
                        raise _StoppedError
                    digests[start] = digest
                    page[: len(data)] = data
                    if start == 0:
                        # The card's own cache, too: the beginning comes last.
                        os.fdatasync(target)
                    _put(target, start, page, len(data))
                    self._count(len(data))
                    step.advance(len(data))
                os.fdatasync(target)
            self.state = "holds the image, unchecked"
            with progress.step(f"read {card} back", total=length) as step:
                _compare(card, length, digests, step, stopping)
        self.state = "is written and read back"

    def _count(self, more: int) -> None:
        self.written += more
        held = f"{self.written >> 20} of {self.length >> 20} MiB"
        self.state = f"holds {held}, unchecked, and does not start"


def write(image: Path, cards: Sequence[Path], replaced: Mapping[Span, bytes]) -> None:
    """Write an image to cards, all at once, and compare all that each then holds.

    replaced: what certain ranges of the image are to hold instead, of the same length. Raises VdibuildError
    when a card is in use, fails, or does not hold what was written; the others are finished all the same.
    When it is interrupted, the error says what each card now is.
    """
    length = image.stat().st_size
    if length % _SECTOR:
        raise VdibuildError(f"{image} does not end with a whole sector: it is damaged")
    writings = [_Writing(image, card, replaced, length) for card in cards]
    try:
        failed = _at_once([writing.run for writing in writings])
    except KeyboardInterrupt:
        now = "; ".join(f"{writing.card} {writing.state}" for writing in writings)
        raise VdibuildError(f"interrupted: {now}", "write it again") from None
    _report(failed, [f"{writing.card} {writing.state}" for writing in writings])


def verify(image: Path, cards: Sequence[Path], skipped: Sequence[Span]) -> None:
    """Compare cards with an image, but for some ranges, all at once. Raises VdibuildError for those that
    differ or fail.
    """
    length = image.stat().st_size
    blank = _blank(skipped)
    with image.open("rb") as source:
        digests = {
            start: hashlib.sha256(_content(source.fileno(), start, length, blank)).digest()
            for start in range(0, length, _RANGE)
        }

    def check(card: Path, stopping: threading.Event) -> None:
        try:
            with progress.step(f"read {card}", total=length) as step:
                _compare(card, length, digests, step, stopping, blank)
        except OSError as error:
            raise VdibuildError(f"{card} cannot be read: {error.strerror}", "take another card") from None

    try:
        failed = _at_once([partial(check, card) for card in cards])
    except KeyboardInterrupt:
        raise VdibuildError("interrupted: nothing was written, and not all was read") from None
    _report(failed, [f"{card} holds it" for card in cards])


def _at_once(works: Sequence[Callable[[threading.Event], None]]) -> list[VdibuildError | None]:
    """Do some works in threads of their own; returns how each failed, or None. On Ctrl-C they are told to
    stop, and have stopped when it goes on.
    """
    stopping = threading.Event()
    with ThreadPoolExecutor(len(works)) as pool:
        # Each in a copy of the context: its steps are then shown, and logged, as this thread's are.
        doing = [pool.submit(contextvars.copy_context().run, work, stopping) for work in works]
        try:
            wait(doing)
        except BaseException:
            stopping.set()
            raise
    failed: list[VdibuildError | None] = []
    for one in doing:
        error = one.exception()
        if error is not None and not isinstance(error, VdibuildError):
            raise error
        failed.append(error)
    return failed


def _report(failed: Sequence[VdibuildError | None], states: Sequence[str]) -> None:
    """Raise the error of the cards that failed, if any did. states: what the others are."""
    errors = [error for error in failed if error]
    if not errors:
        return
    said = [error.message if error else state for error, state in zip(failed, states, strict=True)]
    raise VdibuildError("; ".join(said), errors[0].hint)


def _blank(spans: Sequence[Span]) -> dict[Span, bytes]:
    return {span: bytes(span.length) for span in spans}


def _content(source: int, start: int, length: int, replaced: Mapping[Span, bytes]) -> bytes:
    """A range of the image as it is to be on the card."""
    data = os.pread(source, min(_RANGE, length - start), start)
    if len(data) != min(_RANGE, length - start):
        raise VdibuildError("the image became shorter while it was read")
    return _with(data, start, replaced)


def _ahead(make: Callable[[int], _T], starts: Sequence[int]) -> Iterator[_T]:
    """What is made for each; the next one is being made, in another thread, while one is used."""
    with ThreadPoolExecutor(1) as pool:
        made: Future[_T] | None = None
        for start in starts:
            following = pool.submit(make, start)
            if made:
                yield made.result()
            made = following
        if made:
            yield made.result()


def _with(data: bytes, start: int, replaced: Mapping[Span, bytes]) -> bytes:
    """A range's bytes with what replaces some of them."""
    if not replaced:
        return data
    changed = bytearray(data)
    for span, text in replaced.items():
        begin, end = max(span.start, start), min(span.start + span.length, start + len(data))
        if begin < end:
            changed[begin - start : end - start] = text[begin - span.start : end - span.start]
    return bytes(changed)


def _put(target: int, start: int, page: mmap.mmap, length: int) -> None:
    """Write so many bytes of a page, whose memory is aligned as O_DIRECT wants it; a device may take less
    at a time.
    """
    done = 0
    with memoryview(page) as whole:
        while done < length:
            with whole[done:length] as rest:
                done += os.pwrite(target, rest, start + done)


def _compare(
    card: Path,
    length: int,
    digests: Mapping[int, bytes],
    step: progress.Step,
    stopping: threading.Event,
    replaced: Mapping[Span, bytes] | None = None,
) -> None:
    """Read a card past all caches, and compare it. Raises VdibuildError naming where it differs."""
    wrong = []
    with _opened(card, os.O_RDONLY) as device:
        fcntl.ioctl(device, _BLKFLSBUF)
    with _opened(card, os.O_RDONLY | os.O_DIRECT) as device, mmap.mmap(-1, _RANGE) as page:

        def read(start: int) -> tuple[int, bytes]:
            with memoryview(page) as whole, whole[: min(_RANGE, length - start)] as buffer:
                count = os.preadv(device, [buffer], start)
                return start, bytes(buffer[:count])

        for start, data in _ahead(read, sorted(digests)):
            if stopping.is_set():
                raise _StoppedError
            if hashlib.sha256(_with(data, start, replaced or {})).digest() != digests[start]:
                wrong.append(start)
            step.advance(min(_RANGE, length - start))
    if wrong:
        raise VdibuildError(
            f"{card} does not hold the image: {len(wrong)} of {len(digests)} ranges differ, the first at "
            f"{wrong[0] >> 20} MiB",
            "if it was just written, it is worn or a forgery: take another card",
        )


@contextlib.contextmanager
def _opened(card: Path, flags: int) -> Iterator[int]:
    """A device, for us alone where it is written: the kernel then refuses to mount it, and us if it is."""
    exclusive = os.O_EXCL if flags & os.O_RDWR else 0
    descriptor = os.open(card, flags | exclusive | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
