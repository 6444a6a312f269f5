"""An event loop whose time is made up: it jumps to what is due next, and can be stopped between any steps."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop for tasks that wait for each other and for time, not for sockets. now: where its time begins."""

    def __init__(self, now: float) -> None:
        self._now = now
        super().__init__(selectors.SelectSelector())

    def time(self) -> float:
        return self._now

    def step(self) -> None:
        """Run what is ready, once; when nothing is, what is due next."""
        loop: Any = self  # its lists of what is ready and what is due are its own
        if not loop._ready and loop._scheduled:
            self._now = max(self._now, min(handle.when() for handle in loop._scheduled))
        self.call_soon(self.stop)
        self.run_forever()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self._now + seconds
        marker = self.call_at(end, lambda: None)
        while self._now < end:
            self.step()
        marker.cancel()

    def kill(self) -> None:
        """Forget everything that was under way, as the kernel does with a killed process."""
        # Python runs their `finally` blocks all the same: whatever these reach must know that they are dead.
        self._now = float("inf")
        asyncio.set_event_loop(self)
        for task in asyncio.all_tasks(self):
            task.get_loop().set_exception_handler(lambda *_: None)
            with contextlib.suppress(BaseException):
                coroutine: Any = task.get_coro()
                coroutine.close()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        asyncio.set_event_loop(None)
        self.close()
