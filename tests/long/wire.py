"""A network of its own for one guest: a tap device in a namespace, where nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tests.network import Namespace
from vdibuild import process

TAP = "tap0"
SERVER = "192.0.2.1"
"""The only host in it; its DHCP server gives a guest GUEST."""
GUEST = "192.0.2.20"

_AT_ONCE = 2000
_ANSWER_SECONDS = 1.5


class Wire(Namespace):
    """The network's namespace, and the only host in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.ip(f"tuntap add {TAP} mode tap")
        self.ip(f"address add {SERVER}/24 dev {TAP}")
        # There is room for all that `open_ports` sends at once.
        self.ip(f"link set {TAP} up txqueuelen {2 * _AT_ONCE}")

    @contextlib.contextmanager
    def dhcp(self, settings: str) -> Iterator[None]:
        """A DHCP server, whose option 224 says something."""
        argv = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--log-dhcp"]
        argv += [f"--interface={TAP}", "--bind-interfaces", "--leasefile-ro", "--user=root", "--pid-file="]
        # It knows nothing of the leases of the one before it.
        argv += ["--dhcp-authoritative", "--no-ping"]
        argv += [f"--dhcp-range={GUEST},{GUEST},2m", f"--dhcp-option-force=224,{settings}"]
        with self.entered(), (self._directory / "dnsmasq.log").open("ab") as log:
            running = process.start(argv, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.stop(running)

    @contextlib.asynccontextmanager
    async def forwarded(self, port: int, target: int) -> AsyncIterator[None]:
        """A port of its host that leads to one of 127.0.0.1 outside."""
        carrying: set[asyncio.Task[None]] = set()

        async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", target)
            back = asyncio.create_task(_carry(other_reader, writer))
            carrying.add(back)
            await _carry(reader, other_writer)
            await back

        with self.entered():
            listening = socket.create_server((SERVER, port))
        server = await asyncio.start_server(link, sock=listening)
        try:
            yield
        finally:
            server.close()
            for task in carrying:
                task.cancel()

    async def open_ports(self, address: str, ports: range) -> list[int]:
        """Those of a host's TCP ports that anything answers at, were it a refusal."""
        found = []
        for first in range(ports.start, ports.stop, _AT_ONCE):
            batch = range(first, min(first + _AT_ONCE, ports.stop))
            with self.entered():
                sockets = {port: socket.socket(socket.AF_INET, socket.SOCK_STREAM) for port in batch}
            try:
                for port, one in sockets.items():
                    one.setblocking(False)
                    one.connect_ex((address, port))
                await asyncio.sleep(_ANSWER_SECONDS)
                for port, one in sockets.items():
                    # Without an answer a connection is still being made.
                    if one.connect_ex((address, port)) not in (errno.EALREADY, errno.EINPROGRESS):
                        found.append(port)
            finally:
                for one in sockets.values():
                    one.close()
        return found


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
