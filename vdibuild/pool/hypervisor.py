"""Calls libvirt without holding up anything else: in threads, for so long at most, over a connection that may
break when libvirt is restarted, and is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import libvirt

from vdibuild import libvirt_connection  # noqa: F401 (keeps libvirt from printing what it also raises)
from vdibuild.errors import HostError

CALL_SECONDS = 180.0
"""How long a call may take before libvirt counts as hanging."""

_THREADS = 16

_Result = TypeVar("_Result")


class Hypervisor:
    """One libvirt. uri: how it is reached, such as qemu:///system."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._connection: Any = None
        self._under_way: set[asyncio.Future[Any]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "libvirt")

    async def call(self, work: Callable[[Any], _Result]) -> _Result:
        """The result of `work`, which gets libvirt's connection, in a thread.

        Raises HostError when libvirt cannot be reached, hangs, or fails; what `work` itself raises goes on.
        """
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._work, work)
        self._under_way.add(running)
        running.add_done_callback(self._under_way.discard)
        try:
            # A call that has begun is not taken back: whoever gives up waiting must not undo it in between.
            return await asyncio.wait_for(asyncio.shield(running), CALL_SECONDS)
        except TimeoutError:
            raise HostError(
                f"libvirt at {self.uri} does not answer within {CALL_SECONDS:.0f} s", "restart libvirtd"
            ) from None

    def close(self) -> None:
        """Let libvirt go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        # What hangs in a call still uses the connection; it ends with the process.
        if self._connection is not None and not self._under_way:
            self._connection.close()
            self._connection = None

    def _work(self, work: Callable[[Any], _Result]) -> _Result:
        try:
            return work(self._connected())
        except libvirt.libvirtError as error:
            raise HostError(f"libvirt at {self.uri}: {error.get_error_message()}") from None

    def _connected(self) -> Any:
        connection = self._connection
        if connection is None or not _alive(connection):
            connection = self._connection = libvirt.open(self.uri)
        return connection


def _alive(connection: Any) -> bool:
    try:
        # isAlive() says only what was last seen; a question is seen to be answered.
        connection.getLibVersion()
    except libvirt.libvirtError:
        return False
    return True
