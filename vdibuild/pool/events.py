"""The relay's events, kept until they are acknowledged."""

from __future__ import annotations

from collections import deque

from vdibuild.pool.control import Ended, Event, Linked, Refused

_NEWS = 1000
_COUNTED = 256
_OTHERS = "others"


class EventLog:
    """Numbers events and keeps them.

    What became of leases is kept whole: there is as much of it as offers were made. Of everything else,
    which strangers can cause, the last thousand.
    """

    def __init__(self) -> None:
        self.number = 0
        self._leases: deque[Event] = deque()
        self._news: deque[Event] = deque(maxlen=_NEWS)

    def add(self, event: Event) -> Event:
        """Keep an event; returns it with its number."""
        self.number += 1
        numbered = event.model_copy(update={"number": self.number})
        (self._leases if isinstance(event, Linked | Ended) else self._news).append(numbered)
        return numbered

    def kept(self) -> list[Event]:
        """The events that nobody has acknowledged, in their order."""
        return sorted((*self._leases, *self._news), key=lambda event: event.number)

    def restore(self, events: list[Event], number: int) -> None:
        """Go on where another log ended."""
        for event in events:
            (self._leases if isinstance(event, Linked | Ended) else self._news).append(event)
        self.number = number

    def acknowledge(self, number: int) -> None:
        """Forget the events up to this number."""
        for events in (self._leases, self._news):
            while events and events[0].number <= number:
                events.popleft()


class Refusals:
    """Counts refused links between two reports, by address and reason; of too many addresses only the sum."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], int] = {}

    def add(self, address: str, reason: str) -> bool:
        """Count one. Returns whether it is the first since the last report."""
        first = not self._counted
        key = (address, reason)
        if key not in self._counted and len(self._counted) >= _COUNTED:
            key = (_OTHERS, "too many to tell")
        self._counted[key] = self._counted.get(key, 0) + 1
        return first

    def report(self) -> list[Refused]:
        """What was counted; counting begins anew."""
        counted, self._counted = self._counted, {}
        return [
            Refused(address=address, reason=reason, times=times)
            for (address, reason), times in counted.items()
        ]
