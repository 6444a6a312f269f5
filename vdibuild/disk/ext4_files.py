"""The files of an ext4 file system in a disk image or on a block device, without mounting it: debugfs(8).

Only the program reads the file system; links in it are followed by debugfs, which knows no other root. One
debugfs answers all questions: to start it costs more than each of them does.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vdibuild import process, unsynced
from vdibuild.errors import VdibuildError

_LABEL = "security.selinux"
LABELS = {
    "/etc/hostname": "system_u:object_r:hostname_etc_t:s0",
    "/etc/hosts": "system_u:object_r:net_conf_t:s0",
    "/etc/resolv.conf": "system_u:object_r:net_conf_t:s0",
    "/root/.ssh": "system_u:object_r:ssh_home_t:s0",
    "/root/.ssh/authorized_keys": "system_u:object_r:ssh_home_t:s0",
}
"""What the reference policy says of paths that may be new; others get what their directory has."""

_CHUNK = 1 << 16


@contextlib.contextmanager
def opened(disk: Path, offset: int, scratch: Path) -> Iterator[Ext4Files]:
    """The files of a file system, which nobody else uses meanwhile; what was written is there at the end,
    but not on the disk itself yet.

    disk: a raw image or a block device; offset: where the file system begins, in bytes. scratch: a directory
    for temporary files. Raises VdibuildError when the file system cannot be read or written.
    """
    volume = f"{disk}?offset={offset}"
    # With -f it echoes each command, so that the end of an answer can be told.
    command = ["debugfs", "-w", "-f", "-", volume]
    with (
        os.fdopen(os.memfd_create("stderr"), "w+b") as messages,
        unsynced.sandboxed(command) as (argv, descriptors),
    ):
        debugfs = process.start(argv, stdin=subprocess.PIPE, stderr=messages, pass_fds=descriptors)
        try:
            yield Ext4Files(_Debugfs(debugfs, volume), scratch)
            cast(IO[bytes], debugfs.stdin).close()
            debugfs.wait()
        finally:
            process.stop(debugfs)
        # What failed in between was looked at then; this is the writing of what debugfs has kept back.
        if failed := [line for line in process.logged(messages) if line.startswith("ext2fs_close")]:
            raise VdibuildError(f"{volume} could not be written: {failed[0]}", "is there room for it?")


class _Debugfs:
    """A debugfs that waits for commands. volume: the file system as e2fsprogs names it."""

    def __init__(self, running: subprocess.Popen[bytes], volume: str) -> None:
        self.volume = volume
        self._in = cast(IO[bytes], running.stdin).fileno()
        self._out = cast(IO[bytes], running.stdout).fileno()

    def ask(self, *commands: str) -> str:
        """Give it commands, and return what it printed; what fails is in its messages only.

        Raises VdibuildError when it has ended.
        """
        # A comment is echoed too, without a prompt; nothing in the file system can know it.
        end = f"# {secrets.token_hex(16)}\n".encode()
        try:
            # Straight into the pipe: nothing may be left in a buffer when it has ended.
            os.write(self._in, "".join(f"{command}\n" for command in commands).encode() + end)
        except BrokenPipeError:
            raise self.unreadable() from None
        answer = bytearray()
        while not answer.endswith(end):
            if not (piece := os.read(self._out, _CHUNK)):
                raise self.unreadable()
            answer += piece
        text = answer[: -len(end)].decode(errors="replace")
        for command in commands:
            text = text.replace(f"debugfs: {command}\n", "", 1)
        return text

    def unreadable(self) -> VdibuildError:
        """What to say of a file system that debugfs cannot use."""
        return VdibuildError(f"there is no ext4 file system that can be read in {self.volume}")


class Ext4Files:
    """See tree.Files. A file keeps the SELinux label that it had, and gets the one that belongs to it where
    the system has labels.
    """

    def __init__(self, debugfs: _Debugfs, scratch: Path) -> None:
        self._debugfs = debugfs
        self._scratch = scratch
        if not self.exists("/"):
            raise debugfs.unreadable()
        self._labelled = bool(self._label("/etc"))

    def exists(self, inside: str) -> bool:
        """See Files."""
        return self._debugfs.ask(f"stat {_quoted(inside)}").startswith("Inode:")

    def read(self, inside: str) -> str:
        """A text file; an empty text where there is none."""
        return self._debugfs.ask(f"cat {_quoted(inside)}")

    def copy_out(self, inside: str, target: Path) -> None:
        """Copy a file to this host. Raises VdibuildError where there is none."""
        if not self.exists(inside):
            raise VdibuildError(f"there is no {inside} in {self._debugfs.volume}")
        self._debugfs.ask(f"dump {_quoted(inside)} {_quoted(str(target))}")

    def mode(self, inside: str) -> int:
        """The permissions of what is at that path."""
        return int(re.findall(r"Mode: +(\d+)", self._debugfs.ask(f"stat {_quoted(inside)}"))[0], 8)

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """See Files. Raises VdibuildError when the file system does not hold it afterwards."""
        path = PurePosixPath(inside)
        self.make_directory(str(path.parent))
        label = self._label_for(inside)
        with tempfile.NamedTemporaryFile("w", dir=self._scratch, prefix="file-", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # `write` takes a name in the current directory, not a path, and replaces nothing.
            script = [f"rm {_quoted(inside)}", f"cd {_quoted(str(path.parent))}"]
            script.append(f"write {_quoted(file.name)} {_quoted(path.name)}")
            self._change([*script, *_owned(inside, 0o100000 | mode)], inside, label)
        if self.read(inside) != text or self.mode(inside) != mode:
            raise VdibuildError(
                f"{inside} could not be written to {self._debugfs.volume}", "is the volume full?"
            )

    def make_directory(self, inside: str, mode: int = 0o755) -> None:
        """See Files."""
        path = PurePosixPath(inside)
        if self.exists(inside):
            return
        self.make_directory(str(path.parent), mode)
        label = self._label_for(inside)
        script = [f"cd {_quoted(str(path.parent))}", f"mkdir {_quoted(path.name)}"]
        self._change([*script, *_owned(inside, 0o040000 | mode)], inside, label)

    def remove(self, inside: str) -> None:
        """See Files."""
        self._debugfs.ask(f"rm {_quoted(inside)}")

    def glob(self, pattern: str) -> list[str]:
        """See Files."""
        path = PurePosixPath(pattern)
        listed = self._debugfs.ask(f"ls -p {_quoted(str(path.parent))}")
        # /inode/mode/user/group/name/size/
        names = [line.split("/")[5] for line in listed.splitlines() if line.count("/") > 5]
        return sorted(f"{path.parent}/{name}" for name in fnmatch.filter(names, path.name))

    def _label(self, inside: str) -> bytes:
        """The SELinux label of what is at that path; empty without one."""
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="label-") as file:
            self._debugfs.ask(f"ea_get -f {_quoted(file.name)} {_quoted(inside)} {_LABEL}")
            return Path(file.name).read_bytes()

    def _label_for(self, inside: str) -> bytes:
        if not self._labelled:
            return b""
        if there := self._label(inside):
            return there
        if inside in LABELS:
            return LABELS[inside].encode() + b"\0"
        return self._label(str(PurePosixPath(inside).parent))

    def _change(self, script: Sequence[str], inside: str, label: bytes) -> None:
        # debugfs says what failed and goes on: whoever changes something looks at it afterwards.
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="label-") as file:
            if label:
                file.write(label)
                file.flush()
                script = [*script, f"ea_set -f {_quoted(file.name)} {_quoted(inside)} {_LABEL}"]
            self._debugfs.ask(*script)


def _owned(inside: str, mode: int) -> list[str]:
    fields = (("mode", f"0{mode:o}"), ("uid", "0"), ("gid", "0"))
    return [f"set_inode_field {_quoted(inside)} {field} {value}" for field, value in fields]


def _quoted(path: str) -> str:
    """A path as a word of a command. Raises VdibuildError for one that would be more than a word."""
    if '"' in path or not path.isprintable():
        raise VdibuildError(f"{path!r} is no path that can be used in a file system that is not mounted")
    return f'"{path}"'
