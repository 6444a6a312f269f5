"""The command liveimg: a prepared file system in place of packages."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from vdibuild.errors import InputError
from vdibuild.kickstart.syntax import Command
from vdibuild.recipe import LiveImage


def read(command: Command, error: Callable[[int | None, str, str], InputError]) -> LiveImage:
    """The checked value of the command; error: makes an error of a line, a message and a hint."""
    value, line = command.value, command.line
    for url in filter(None, (value.url, value.proxy)):
        if not _is_location(url):
            raise error(line, f"{url!r} is no URL", "write it like https://example.org/image.tar.zst")
    checksum = value.checksum or ""
    if checksum and not re.fullmatch(r"[0-9A-Fa-f]{64}", checksum):
        raise error(line, "--checksum is no SHA-256", "64 hexadecimal digits, as sha256sum prints them")
    return LiveImage(value.url, checksum.lower(), line, value.proxy or "", not value.noverifyssl)


def _is_location(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https", "ftp") and bool(parts.hostname)
    except ValueError:
        return False
    return (known or url.startswith("file:///")) and url.isprintable() and " " not in url
