"""A machine whose graphics card has two sockets for monitors, the second of which is QEMU's to plug in."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

CARD = "video"
"""The card's id, by which QEMU's monitor takes pictures of each monitor's screen (`head`)."""

# RFB 3.8 (RFC 6143), and its extension ExtendedDesktopSize (the RFB protocol's community version).
_VERSION = b"RFB 003.008\n"
_NO_SECURITY = 1
_SET_ENCODINGS = 2
_EXTENDED_DESKTOP_SIZE = -308
_SET_DESKTOP_SIZE = 251


def options(directory: Path) -> list[str]:
    """QEMU's, for the card, and for who plugs a monitor in."""
    argv = ["-device", f"virtio-vga,id={CARD},max_outputs=2"]
    return [*argv, "-vnc", f"unix:{_socket(directory)},display={CARD},head=1"]


@contextlib.contextmanager
def plugged_in(directory: Path, width: int, height: int) -> Iterator[None]:
    """Plug in a second monitor: a viewer of the second screen whose window has that size, in pixels."""
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(30)
        viewer.connect(str(_socket(directory)))
        assert _read(viewer, len(_VERSION)) == _VERSION
        viewer.sendall(_VERSION)
        (count,) = _read(viewer, 1)
        assert _NO_SECURITY in _read(viewer, count)
        viewer.sendall(bytes([_NO_SECURITY]))
        assert _read(viewer, 4) == bytes(4)
        viewer.sendall(b"\1")  # others may look, too
        (length,) = struct.unpack("!20xI", _read(viewer, 24))
        _read(viewer, length)
        viewer.sendall(struct.pack("!BxHi", _SET_ENCODINGS, 1, _EXTENDED_DESKTOP_SIZE))
        screen = struct.pack("!IHHHHI", 0, 0, 0, width, height, 0)
        viewer.sendall(struct.pack("!BxHHBx", _SET_DESKTOP_SIZE, width, height, 1) + screen)
        yield


def _socket(directory: Path) -> Path:
    return directory / "monitors"


def _read(viewer: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = viewer.recv(length - len(data))
        assert more, "QEMU hung up"
        data += more
    return data
