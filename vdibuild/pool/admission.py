"""How many links may be half open: in all, and from one address."""

from __future__ import annotations

from collections.abc import Callable


class Admission:
    """Counts what has connected and is not let in yet.

    total: how many in all. per_address: how many from one address. When all places are taken, the address
    that holds most loses its oldest one: a flood cannot keep a station out that comes from elsewhere.
    """

    def __init__(self, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._places: dict[str, dict[int, Callable[[], object]]] = {}
        self._count = 0
        self._next = 0

    def enter(self, address: str, leave: Callable[[], object]) -> int | None:
        """A place for one more, or None. leave: makes it go when the place is needed for another."""
        held = self._places.get(address, {})
        if len(held) >= self._per_address:
            return None
        if self._count >= self._total:
            greediest = max(self._places, key=lambda one: len(self._places[one]))
            if len(self._places[greediest]) <= len(held):
                return None
            place = next(iter(self._places[greediest]))
            self._places[greediest][place]()
            self.leave(greediest, place)
        self._next += 1
        self._count += 1
        self._places.setdefault(address, held)[self._next] = leave
        return self._next

    def leave(self, address: str, place: int) -> None:
        """Give a place back; once or more often."""
        held = self._places.get(address, {})
        if held.pop(place, None) is not None:
            self._count -= 1
        if not held:
            self._places.pop(address, None)
