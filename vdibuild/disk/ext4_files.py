"""The files of an ext4 file system in a disk image or on a block device, without mounting it: debugfs(8).

Only the program reads the file system; links in it are followed by debugfs, which knows no other root.
"""

from __future__ import annotations

import fnmatch
import re
import tempfile
from pathlib import Path, PurePosixPath

from vdibuild import process
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


class Ext4Files:
    """See tree.Files. disk: a raw image or a block device; offset: where the file system begins, in bytes.

    scratch: a directory for temporary files. A file keeps the SELinux label that it had, and gets the one
    that belongs to it where the system has labels.
    """

    def __init__(self, disk: Path, offset: int, scratch: Path) -> None:
        self._volume = f"{disk}?offset={offset}"
        self._scratch = scratch
        self._labelled = bool(self._label("/etc"))

    def exists(self, inside: str) -> bool:
        """See Files."""
        return self._look("stat", inside).startswith("Inode:")

    def read(self, inside: str) -> str:
        """A text file; an empty text where there is none."""
        return self._look("cat", inside)

    def mode(self, inside: str) -> int:
        """The permissions of what is at that path."""
        return int(re.findall(r"Mode: +(\d+)", self._look("stat", inside))[0], 8)

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """See Files. Raises VdibuildError when the file system does not hold it afterwards."""
        path = PurePosixPath(inside)
        self.make_directory(str(path.parent))
        label = self._label_for(inside)
        with tempfile.NamedTemporaryFile("w", dir=self._scratch, prefix="file-", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # `write` takes a name in the current directory, not a path, and replaces nothing.
            script = [f'rm "{inside}"', f'cd "{path.parent}"', f'write "{file.name}" "{path.name}"']
            self._change(script + self._owned(inside, 0o100000 | mode), inside, label)
        if self.read(inside) != text or self.mode(inside) != mode:
            raise VdibuildError(f"{inside} could not be written to {self._volume}", "is the volume full?")

    def make_directory(self, inside: str, mode: int = 0o755) -> None:
        """See Files."""
        path = PurePosixPath(inside)
        if self.exists(inside):
            return
        self.make_directory(str(path.parent), mode)
        label = self._label_for(inside)
        script = [f'cd "{path.parent}"', f'mkdir "{path.name}"']
        self._change(script + self._owned(inside, 0o040000 | mode), inside, label)

    def remove(self, inside: str) -> None:
        """See Files."""
        self._run([f'rm "{inside}"'])

    def glob(self, pattern: str) -> list[str]:
        """See Files."""
        path = PurePosixPath(pattern)
        # /inode/mode/user/group/name/size/
        names = [line.split("/")[5] for line in self._look("ls -p", str(path.parent)).splitlines() if line]
        return sorted(f"{path.parent}/{name}" for name in fnmatch.filter(names, path.name))

    def _owned(self, inside: str, mode: int) -> list[str]:
        fields = (("mode", f"0{mode:o}"), ("uid", "0"), ("gid", "0"))
        return [f'set_inode_field "{inside}" {field} {value}' for field, value in fields]

    def _label(self, inside: str) -> bytes:
        """The SELinux label of what is at that path; empty without one."""
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="label-") as file:
            self._run([f'ea_get -f "{file.name}" "{inside}" {_LABEL}'])
            return Path(file.name).read_bytes()

    def _label_for(self, inside: str) -> bytes:
        if not self._labelled:
            return b""
        if there := self._label(inside):
            return there
        if inside in LABELS:
            return LABELS[inside].encode() + b"\0"
        return self._label(str(PurePosixPath(inside).parent))

    def _change(self, script: list[str], inside: str, label: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="label-") as file:
            if label:
                file.write(label)
                file.flush()
                script = [*script, f'ea_set -f "{file.name}" "{inside}" {_LABEL}']
            self._run(script)

    def _look(self, command: str, inside: str) -> str:
        return process.run(["debugfs", "-R", f'{command} "{inside}"', self._volume], capture=True).stdout

    def _run(self, script: list[str]) -> None:
        # debugfs says what failed and goes on: whoever changes something looks at it afterwards.
        text = "".join(f"{line}\n" for line in script)
        process.run(["debugfs", "-w", "-f", "-", self._volume], stdin=text, capture=True)
