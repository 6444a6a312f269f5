"""What systemd hands to a process, and hears from it (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket

_FIRST_DESCRIPTOR = 3  # sd-daemon.h: SD_LISTEN_FDS_START


def listening() -> socket.socket | None:
    """The socket on which systemd listens for this process, None where it does not."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    found = socket.socket(fileno=_FIRST_DESCRIPTOR)
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def ready() -> None:
    """Tell systemd, where it runs this process, that it serves, as its unit's main process from now on."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
        # An abstract address is written with an @.
        telling.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        telling.send(f"READY=1\nMAINPID={os.getpid()}".encode())
