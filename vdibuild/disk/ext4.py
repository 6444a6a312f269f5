"""ext4 file systems in plain files (ext2 and ext3 too), as e2fsprogs and their inode tables tell of them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vdibuild import process
from vdibuild.disk.image import confined
from vdibuild.errors import InputError

# Linux: fs/ext4/ext4.h, struct ext4_inode: i_mode, i_mtime, i_links_count, l_i_version; behind the first 128
# bytes i_extra_isize and i_mtime_extra: nanoseconds, and two bits more of the seconds.
_INODE = struct.Struct("<H14xi6xH8xI")
_SHORT = 128
_EXTRA_SIZE, _MTIME_EXTRA = 0x80, 0x88

# The same, struct ext4_super_block: s_mtime, s_magic, s_state, s_lastcheck, s_feature_incompat and
# s_last_orphan.
_SUPERBLOCK = 1024
_SUPER = struct.Struct("<44xI8xHH4xI28xI132xI")
_MAGIC, _VALID, _RECOVER = 0xEF53, 1, 4


@dataclass(frozen=True)
class Inode:
    """An inode in use. mtime_ns: nanoseconds since 1970. version: of NFS's, 32 bits."""

    number: int
    mode: int
    mtime_ns: int
    version: int


def numbers(volume: Path, scratch: Path, *names: str) -> list[int]:
    """Numbers of the superblock, named as dumpe2fs names them."""
    argv = confined(["dumpe2fs", "-h", str(volume)], scratch)
    header = process.run(argv, capture=True).stdout
    return [int(re.findall(rf"^{name}:\s+(\d+)", header, re.M)[0]) for name in names]


def is_clean(disk: Path, offset: int, *, checked: bool = False) -> bool:
    """Whether a file system has nothing left in its journal, and no errors.

    offset: where it begins on the disk, in bytes. checked: and was checked since it was mounted the last
    time, if it ever was, as resize2fs asks.
    """
    with disk.open("rb") as file:
        file.seek(offset + _SUPERBLOCK)
        mounted_at, magic, state, checked_at, incompatible, orphan = _SUPER.unpack(file.read(_SUPER.size))
    clean = (magic, state, orphan) == (_MAGIC, _VALID, 0) and not incompatible & _RECOVER
    return clean and (not checked or checked_at >= mounted_at)


def journal(volume: Path, scratch: Path) -> int:
    """KiB of its journal; 0 without one."""
    said = process.run(confined(["dumpe2fs", "-h", str(volume)], scratch), capture=True).stdout
    found = re.search(r"^Total journal size: +(\d+)([kMG])", said, re.M)
    return int(found[1]) * {"k": 1, "M": 1 << 10, "G": 1 << 20}[found[2]] if found else 0


def replay(volume: Path, scratch: Path, where: str) -> None:
    """Replay its journal, as mounting would do. where: what it is called in the InputError."""
    argv = ["e2fsck", "-p", "-E", "journal_only", str(volume)]
    done = process.run(confined(argv, scratch), check=False)
    if done.status > 1:  # 1: mended
        raise InputError(where, None, "the journal cannot be replayed", "start the machine and shut it down")


def inodes(volume: Path, scratch: Path) -> Iterator[Inode]:
    """All its inodes that are in use, out of the tables that hold them."""
    said = process.run(confined(["dumpe2fs", str(volume)], scratch), capture=True).stdout
    block, size, count = (
        int(re.findall(rf"^{name}:\s+(\d+)", said, re.M)[0])
        for name in ("Block size", "Inode size", "Inodes per group")
    )
    with volume.open("rb") as file:
        for text in re.split(r"^Group (?=\d+:)", said, flags=re.M)[1:]:
            group, start = int(text.split(":")[0]), int(re.findall(r"Inode table at (\d+)", text)[0])
            unused = re.search(r"(\d+) unused inodes", text)
            file.seek(start * block)
            table = file.read((count - int(unused[1] if unused else 0)) * size)
            for index in range(len(table) // size):
                mode, mtime, links, version = _INODE.unpack_from(table, index * size)
                if links:
                    time = mtime * 1_000_000_000 + _extra(table[index * size : (index + 1) * size])
                    yield Inode(group * count + index + 1, mode, time, version)


def _extra(inode: bytes) -> int:
    """What an inode's larger part adds to its time of change, in nanoseconds."""
    if len(inode) <= _SHORT:
        return 0
    (extra,) = struct.unpack_from("<H", inode, _EXTRA_SIZE)
    if _SHORT + extra < _MTIME_EXTRA + 4:
        return 0
    bits = int.from_bytes(inode[_MTIME_EXTRA : _MTIME_EXTRA + 4], "little")
    return ((bits & 3) << 32) * 1_000_000_000 + (bits >> 2)
