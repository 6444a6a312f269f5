"""Networks that only a test has: namespaces of this process's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests import libc
from vdibuild import process

_NEW_NET = 0x40000000  # CLONE_NEWNET (linux/sched.h)


class Namespace:
    """A network namespace. It is gone when nothing uses it any more: it has no name, and no process."""

    def __init__(self) -> None:
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        libc.call("unshare", _NEW_NET)
        try:
            self.descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            process.run(["ip", "link", "set", "lo", "up"])
        finally:
            libc.call("setns", self._outside, 0)

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._outside)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in it: what it opens, and what it starts, stays there."""
        libc.call("setns", self.descriptor, 0)
        try:
            yield
        finally:
            libc.call("setns", self._outside, 0)

    def ip(self, command: str) -> None:
        """Run a command of ip(8) in it."""
        with self.entered():
            process.run(["ip", *command.split()])
