"""A relay's start in the place of an older one: sockets and knowledge pass over the control socket."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from vdibuild.errors import HostError
from vdibuild.pool import control
from vdibuild.pool.control import ControlError, Estate, Replace

CONTROL, PLAIN, TLS = "control", "plain", "tls"
"""What a listening socket is for."""

_SECONDS = 15.0
_LENGTH = struct.Struct("<Q")
_MOST = 8


@dataclass
class Inheritance:
    """What an older relay handed over.

    connection: to it; on it come the ends of the sessions that it still has.
    """

    listeners: dict[str, socket.socket]
    estate: Estate
    connection: socket.socket


def take(path: Path) -> Inheritance | None:
    """Ask the relay that serves this control socket to hand over; None where there is none.

    It goes on as before unless it gets an `ack` on the connection within a few seconds. Raises HostError.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except PermissionError:
        connection.close()
        raise HostError(
            f"{path} is somebody else's", "run the relay as the user whose relay is there"
        ) from None
    descriptors: list[int] = []
    try:
        connection.sendall(Replace().line())
        length, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _MOST)
        estate = control.report(_exactly(connection, _LENGTH.unpack(length)[0]))
        if not isinstance(estate, Estate) or len(estate.listeners) != len(descriptors):
            raise ControlError("it sent something else")
    except (OSError, EOFError, struct.error, ControlError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        raise HostError(
            f"the relay that runs at {path} does not hand over: {error}",
            "look at its log; stop it if it hangs, which ends its sessions",
        ) from None
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    for one in sockets:
        one.setblocking(False)
    return Inheritance(dict(zip(estate.listeners, sockets, strict=True)), estate, connection)


def send(connection: int, listeners: dict[str, socket.socket], line: bytes) -> None:
    """Send the listening sockets, and with them how long the line of the estate is that has to follow.

    connection: the descriptor of the control connection.
    """
    with socket.socket(fileno=os.dup(connection)) as channel:
        descriptors = [one.fileno() for one in listeners.values()]
        socket.send_fds(channel, [_LENGTH.pack(len(line))], descriptors)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        received = connection.recv(size - len(data))
        if not received:
            raise EOFError("it went away")
        data += received
    return bytes(data)
