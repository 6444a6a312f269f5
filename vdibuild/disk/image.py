"""A disk image of any kind, only ever read: raw file, qcow2 or block device.

An image is untrusted. A qcow2 may name other files of this host as its backing or data file, so one that
does is refused, and programs that read file systems do it in a sandbox (`confined`).
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vdibuild import process
from vdibuild.errors import CommandError, InputError

_FORMATS = ("raw", "qcow2")


class Image:
    """A disk image. path: where it is. form: raw or qcow2. size: as a guest sees it, in bytes.

    scratch: a directory for temporary files. Raises InputError when it is no image that can be read alone.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path.resolve()
        self.scratch = scratch
        try:
            mode = self.path.stat().st_mode
        except OSError as error:
            raise InputError(path, None, f"cannot be read: {error.strerror}") from error
        if stat.S_ISBLK(mode):
            self.form, self.size = "raw", _device_size(self.path)
        elif stat.S_ISREG(mode):
            self.form, self.size = _described(self.path)
        else:
            raise InputError(path, None, "is neither a file nor a block device")

    def read(self, offset: int, length: int) -> bytes:
        """A piece of the disk; positions in bytes. Shorter where the disk ends."""
        length = max(0, min(length, self.size - offset))
        if self.form == "raw":
            with self.path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        with tempfile.NamedTemporaryFile(dir=self.scratch, prefix="piece-") as piece:
            self.cut([(offset, length)], Path(piece.name))
            return Path(piece.name).read_bytes()

    def cut(self, pieces: Sequence[tuple[int, int]], output: Path) -> None:
        """Copy pieces of the disk, one after the other, into a sparse file.

        pieces: offset and size of each, in bytes, multiples of 512.
        """
        with output.open("wb") as file:
            file.truncate(sum(size for _, size in pieces))
        position = 0
        for offset, size in pieces:
            source = f"driver=raw,offset={offset},size={size},{self._node()}"
            target = f"driver=raw,offset={position},size={size},{_file('file', 'file', output)}"
            # The new file is zeros already: qemu-img need not write any.
            argv = ["qemu-img", "convert", "-n", "--target-is-zero", "--image-opts", "--target-image-opts"]
            process.run([*argv, source, target])
            position += size

    def _node(self) -> str:
        driver = "host_device" if stat.S_ISBLK(self.path.stat().st_mode) else "file"
        if self.form == "raw":
            return _file("file", driver, self.path)
        return f"file.driver={self.form},{_file('file.file', driver, self.path)}"


def _file(node: str, driver: str, path: Path) -> str:
    """A file as qemu-img's --image-opts name it: a comma in the name is doubled."""
    return f"{node}.driver={driver},{node}.filename={str(path).replace(',', ',,')}"


def _device_size(path: Path) -> int:
    try:
        # O_EXCL on a block device: not while its file systems are mounted, or it belongs to another device.
        descriptor = os.open(path, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InputError(path, None, "the device is in use", "unmount it, or take a snapshot") from error
        raise InputError(path, None, f"cannot be read: {error.strerror}") from error
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def _described(path: Path) -> tuple[str, int]:
    """An image file's format and virtual size in bytes."""
    try:
        done = process.run(["qemu-img", "info", "--output=json", f"file:{path}"], capture=True)
    except CommandError as error:
        reason = error.tail[-1].removeprefix("qemu-img: ") if error.tail else "qemu-img cannot read it"
        raise InputError(path, None, f"is no disk image that can be read: {reason}") from error
    info = json.loads(done.stdout)
    form, details = info["format"], info.get("format-specific", {}).get("data", {})
    if form not in _FORMATS:
        raise InputError(
            path, None, f"is a {form} image", f"qemu-img convert -f {form} -O qcow2 makes one to use"
        )
    for what, name in (
        ("a backing file", info.get("backing-filename")),
        ("a data file", details.get("data-file")),
    ):
        if name:
            raise InputError(
                path,
                None,
                f"the image needs {what}: {name}",
                "if you trust it, `qemu-img convert -O qcow2` makes an image of its own",
            )
    if info.get("encrypted"):
        raise InputError(path, None, "the image is encrypted")
    if details.get("corrupt"):
        raise InputError(path, None, "the image is marked corrupt", "`qemu-img check -r all` may mend it")
    return form, info["virtual-size"]


def confined(argv: Sequence[str], writable: Path) -> list[str]:
    """A command that reads what nobody trusts: it sees this host read-only, and no network.

    writable: the one directory that it can write to.
    """
    sandbox = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all"]
    sandbox += ["--bind", str(writable), str(writable), "--die-with-parent", "--cap-drop", "ALL"]
    return [*sandbox, "--", *argv]
