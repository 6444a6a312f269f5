"""A squashfs whose every read is compared with a hash, by the kernel's dm-verity.

The hashes lie behind the file system, in the same file: a tree of them, whose root is among the kernel's
arguments. overlays/kiosk's dracut module vdibuild-check makes the device of them. Format:
kernel.org, admin-guide/device-mapper/verity; and cryptsetup's docs/on-disk-format, "DMVerity".
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from vdibuild import hashing, process
from vdibuild.errors import VdibuildError

_BLOCK = 4096  # bytes that are hashed as one; mksquashfs pads its files to as many
_DEVICE = "/dev/mapper/vdibuild-system"
_NAMESPACE = uuid.UUID("0f3c1a52-8d0e-4c57-9a55-3f2a3b6f7a10")


@dataclass(frozen=True)
class Verity:
    """The hashes of a squashfs. blocks: how many of 4096 bytes it has. root: the hash of all, SHA-256; salt:
    what each hash begins with; both in hexadecimal.
    """

    blocks: int
    root: str
    salt: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """The kernel's: what the device is made of, and that dracut takes that as the system.

        dmsquash-live looks for the name beside the medium's directory; the file that is there keeps another
        one, so that it can never be taken unchecked.
        """
        return (
            f"rd.live.squashimg=../../../..{_DEVICE}",
            f"vdibuild.verity={self.blocks}:{self.root}:{self.salt}",
        )


def append(image: Path, name: str) -> Verity:
    """Append its hashes to a squashfs. name: what salt and UUID are made of: the same name and squashfs give
    the same bytes. Raises VdibuildError, CommandError.
    """
    size = image.stat().st_size
    if size % _BLOCK:
        raise VdibuildError(f"{image} has {size} bytes, which are no blocks of {_BLOCK}")
    hashed = Verity(size // _BLOCK, "", hashing.of_text(name))
    with tempfile.TemporaryDirectory(prefix="vdibuild-verity-") as private:
        root = Path(private) / "root"
        argv = ["veritysetup", "format", f"--hash-offset={size}", f"--data-blocks={hashed.blocks}"]
        argv += [f"--data-block-size={_BLOCK}", f"--hash-block-size={_BLOCK}", "--hash=sha256"]
        argv += [f"--salt={hashed.salt}", f"--uuid={uuid.uuid5(_NAMESPACE, name)}"]
        process.run([*argv, f"--root-hash-file={root}", str(image), str(image)])
        return Verity(hashed.blocks, root.read_text().strip(), hashed.salt)
