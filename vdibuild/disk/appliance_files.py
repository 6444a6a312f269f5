"""The files of a system whose file systems are mounted in the libguestfs appliance."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from vdibuild.disk.ext4_files import LABELS

_LABEL = "security.selinux"


class GuestFiles:
    """See tree.Files; links are resolved by libguestfs, within the system. guest: its handle."""

    def __init__(self, guest: Any) -> None:
        self._guest = guest
        self._labelled = bool(self._label("/etc"))

    def exists(self, inside: str) -> bool:
        """See Files."""
        return bool(self._guest.exists(inside))

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """See Files."""
        self.make_directory(str(PurePosixPath(inside).parent))
        new = not self._guest.is_file(inside)
        if new:
            self.remove(inside)
        self._guest.write(inside, text.encode())
        self._own(inside, mode, new)

    def make_directory(self, inside: str, mode: int = 0o755) -> None:
        """See Files."""
        if not self._guest.exists(inside):
            self.make_directory(str(PurePosixPath(inside).parent), mode)
            self._guest.mkdir(inside)
            self._own(inside, mode, True)

    def remove(self, inside: str) -> None:
        """See Files."""
        self._guest.rm_f(inside)

    def glob(self, pattern: str) -> list[str]:
        """See Files."""
        return sorted(self._guest.glob_expand(pattern))

    def _own(self, inside: str, mode: int, new: bool) -> None:
        self._guest.chown(0, 0, inside)
        self._guest.chmod(mode, inside)
        if new and self._labelled:
            label = LABELS.get(inside, "") or self._label(str(PurePosixPath(inside).parent))
            self._guest.setxattr(_LABEL, label, len(label), inside)

    def _label(self, inside: str) -> str:
        found = self._guest.getxattrs(inside)
        # The kernel's ends with a zero byte, which libguestfs does not take.
        values = [one["attrval"].decode().rstrip("\0") for one in found if one["attrname"] == _LABEL]
        return values[0] if values else ""
