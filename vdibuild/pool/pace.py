"""How many machines to start at a time: measured, for it depends on processors, disks, image and load."""

from __future__ import annotations

_WORTH = 1.1
"""One more start at a time stays when it brings this much more machines per second."""

_NEWEST = 0.5
"""The weight of a new measurement against all before it."""


class Pace:
    """The number of starts at a time that makes most machines per second.

    It climbs by one for as long as that pays, and steps down when it does not. most: a bound.
    """

    def __init__(self, most: int) -> None:
        self.limit = 1
        self._most = most
        self._seconds: dict[int, float] = {}

    def record(self, parallel: int, seconds: float) -> None:
        """A start took so many seconds; `parallel` were under way, this one included, when it began."""
        before = self._seconds.get(parallel, seconds)
        self._seconds[parallel] = before + _NEWEST * (seconds - before)
        if parallel != self.limit:
            return  # fewer were wanted, or the limit has changed since: it says nothing about the limit
        if self._rate(self.limit) >= self._rate(self.limit - 1) * _WORTH:
            self.limit = min(self.limit + 1, self._most)
        else:
            self.limit = max(self.limit - 1, 1)

    def _rate(self, parallel: int) -> float:
        """Machines per second at that many at a time; 0 when it was never measured."""
        seconds = self._seconds.get(parallel)
        return parallel / max(seconds, 1e-6) if seconds is not None else 0.0
