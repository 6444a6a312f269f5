"""Writes an image to a card or stick, and reads all of it back from the card itself.

Worn and counterfeit cards take what is written without a word, and lose it; the kernel's caches would hide
that. So what is read back comes past them (O_DIRECT), and is compared range by range. The image's beginning,
with its boot sector and partition table, is written last: a card that was not finished does not start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdibuild import process, progress
from vdibuild.errors import VdibuildError
from vdibuild.station import Span

_RANGE = 4 << 20  # bytes that are written, read and compared as one
_SECTOR = 512
_BLKFLSBUF = 0x1261  # linux/fs.h: write a block device's buffers, and forget them
_PART_TYPES = ("part", "disk", "loop")
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


def write(image: Path, card: Path, replaced: Mapping[Span, bytes]) -> None:
    """Write an image to a card, and compare all that the card then holds.

    replaced: what certain ranges of the image are to hold instead, of the same length. Raises VdibuildError
    when the card is in use, fails, or does not hold what was written; also when it is interrupted, since the
    card is worth nothing then.
    """
    length = image.stat().st_size
    if length % _SECTOR:
        raise VdibuildError(f"{image} does not end with a whole sector: it is damaged")
    written = 0
    try:
        with image.open("rb") as source, _opened(card, os.O_RDWR) as target:
            digests: dict[int, bytes] = {}
            with progress.step(f"write {card}", total=length) as step:
                _put(target, 0, bytes(min(_RANGE, length)))
                # Only what is on the card counts as written: for the bar, for the order, and for errors.
                os.fdatasync(target)
                for start in [*range(_RANGE, length, _RANGE), 0]:
                    data = _content(source.fileno(), start, length, replaced)
                    digests[start] = hashlib.sha256(data).digest()
                    _put(target, start, data)
                    os.fdatasync(target)
                    written += len(data)
                    step.advance(len(data))
            with progress.step(f"read {card} back", total=length) as step:
                _compare(card, length, digests, step)
    except OSError as error:
        raise VdibuildError(
            f"{card} failed after {written >> 20} MiB: {error.strerror}",
            "it holds a part of the image and does not start; take another card",
        ) from None
    except KeyboardInterrupt:
        raise VdibuildError(
            f"interrupted: {card} holds {written >> 20} of {length >> 20} MiB, unchecked", "write it again"
        ) from None


def verify(image: Path, card: Path, skipped: Sequence[Span]) -> None:
    """Compare a card with an image, but for some ranges. Raises VdibuildError when it differs or fails."""
    length = image.stat().st_size
    try:
        with image.open("rb") as source, progress.step(f"read {card}", total=length) as step:
            digests: dict[int, bytes] = {}
            for start in range(0, length, _RANGE):
                data = _content(source.fileno(), start, length, _blank(skipped))
                digests[start] = hashlib.sha256(data).digest()
            _compare(card, length, digests, step, _blank(skipped))
    except OSError as error:
        raise VdibuildError(f"{card} cannot be read: {error.strerror}", "take another card") from None


def _blank(spans: Sequence[Span]) -> dict[Span, bytes]:
    return {span: bytes(span.length) for span in spans}


def _content(source: int, start: int, length: int, replaced: Mapping[Span, bytes]) -> bytes:
    """A range of the image as it is to be on the card."""
    data = os.pread(source, min(_RANGE, length - start), start)
    if len(data) != min(_RANGE, length - start):
        raise VdibuildError("the image became shorter while it was read")
    return _with(data, start, replaced)


def _with(data: bytes, start: int, replaced: Mapping[Span, bytes]) -> bytes:
    """A range's bytes with what replaces some of them."""
    changed = bytearray(data)
    for span, text in replaced.items():
        begin, end = max(span.start, start), min(span.start + span.length, start + len(data))
        if begin < end:
            changed[begin - start : end - start] = text[begin - span.start : end - span.start]
    return bytes(changed)


def _put(target: int, start: int, data: bytes) -> None:
    """Write all of it; a device may take less at a time."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, start)
        view, start = view[count:], start + count


def _compare(
    card: Path,
    length: int,
    digests: Mapping[int, bytes],
    step: progress.Step,
    replaced: Mapping[Span, bytes] | None = None,
) -> None:
    """Read a card past all caches, and compare it. Raises VdibuildError naming where it differs."""
    wrong = []
    with _opened(card, os.O_RDONLY) as device:
        fcntl.ioctl(device, _BLKFLSBUF)
    with _opened(card, os.O_RDONLY | os.O_DIRECT) as device, mmap.mmap(-1, _RANGE) as page:
        # A page's memory is aligned, as O_DIRECT wants it.
        for start in sorted(digests):
            wanted = min(_RANGE, length - start)
            with memoryview(page) as whole, whole[:wanted] as buffer:
                count = os.preadv(device, [buffer], start)
                data = bytes(buffer[:count])
            if hashlib.sha256(_with(data, start, replaced or {})).digest() != digests[start]:
                wrong.append(start)
            step.advance(wanted)
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
