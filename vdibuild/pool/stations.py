"""The stations that are known by name: each has a token in its kiosk image.

The file has one line a station: its name and the SHA-256 of its token, which is written down nowhere else. A
token is 256 random bits, so that a plain digest is as good as a slow one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from vdibuild.errors import InputError
from vdibuild.output import replace

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62}) ([0-9a-f]{64})")


class Stations:
    """The stations of a file, which is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[int, int] | None = None
        self._names: dict[str, str] = {}

    def named(self, token: str) -> str | None:
        """The name of the station that has this token. Raises InputError for a damaged file."""
        self._refresh()
        # Looked up by digest: how long that takes says nothing about the token.
        return self._names.get(_digest(token))

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._read, self._names = None, {}
            return
        if self._read != (status.st_mtime_ns, status.st_ino):
            self._names = {digest: name for name, digest in _read(self._path).items()}
            self._read = (status.st_mtime_ns, status.st_ino)


def enrol(path: Path, name: str) -> str:
    """A new token for a station, which replaces the one it had. Raises InputError."""
    token = secrets.token_urlsafe(32)
    line = f"{name} {_digest(token)}"
    if not _LINE.fullmatch(line):
        raise InputError(path, None, f"{name!r} is no name of a station", "letters, digits, dots, dashes")
    known = _read(path) if path.exists() else {}
    known[name] = _digest(token)
    lines = (f"{station} {digest}\n" for station, digest in sorted(known.items()))
    replace(path, "".join(lines), 0o640)
    return token


def _read(path: Path) -> dict[str, str]:
    known = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise InputError(
                path, number, "is no station: a name and the SHA-256 of its token", "enrol it again"
            )
        known[match[1]] = match[2]
    return known


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
