"""Zeros on block devices, which keep what was on them: another machine's data, for whoever gets them next.

Some devices can forget a range that they are told, and write nothing: SSDs, thin SAN volumes, virtio, loop.
fallocate(2) with FALLOC_FL_PUNCH_HOLE asks for just that, and fails where a device cannot hold zeros without
being sent them. To the others the kernel writes zeros (BLKZEROOUT), at their own speed.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from vdibuild import process, progress
from vdibuild.errors import HostError

_BLKZEROOUT = 0x127F  # _IO(0x12, 127), include/uapi/linux/fs.h: struct { u64 start, length }
_PIECE = 64 << 20
"""Bytes that are written at once: how long Ctrl-C may have to wait."""


def by_itself(device: Path) -> bool:
    """Let a whole device hold zeros, if it can do that without writing them; else nothing is done."""
    if not _discards(device):
        return False  # a disk with WRITE SAME could, and would write them all the same
    argv = ["fallocate", "--punch-hole", "--offset", "0", "--length", str(_size(device)), str(device)]
    return process.run(argv, check=False).status == 0


def write(device: int, start: int, length: int) -> None:
    """Let a part of a device hold zeros. device: open for writing; start, length: bytes."""
    end = start + length
    for piece in range(start, end, _PIECE):
        fcntl.ioctl(device, _BLKZEROOUT, struct.pack("QQ", piece, min(_PIECE, end - piece)))


def erase(device: Path) -> None:
    """Let a whole device hold zeros; on return it does itself, not only this host's memory of it.

    Raises HostError when it cannot be written.
    """
    try:
        size = _size(device)
        with progress.step("erase the volume", total=size) as step, device.open("r+b", buffering=0) as file:
            if by_itself(device):
                step.advance(size)
            else:
                for start in range(0, size, _PIECE):
                    length = min(_PIECE, size - start)
                    write(file.fileno(), start, length)
                    step.advance(length)
            os.fsync(file.fileno())
    except OSError as error:
        raise HostError(
            f"{device} cannot be erased: {error.strerror}",
            "see the kernel's log; whoever gets its room next may read what is on it",
        ) from error


def _discards(device: Path) -> bool:
    """Whether a device gives blocks back (Documentation/ABI/stable/sysfs-block of Linux)."""
    number = device.stat().st_rdev
    limit = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/discard_max_bytes")
    return limit.exists() and int(limit.read_text()) > 0


def _size(device: Path) -> int:
    with device.open("rb") as file:
        return file.seek(0, os.SEEK_END)
