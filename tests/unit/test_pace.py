"""How many starts at a time: it finds what the host can do."""

from __future__ import annotations

import pytest

from vdibuild.pool.pace import Pace


@pytest.mark.parametrize("processors", [1, 2, 4, 100])
def test_it_finds_the_number_of_processors(processors: int) -> None:
    """A host on which a start takes ten seconds of one processor: more at a time than those only wait."""
    pace = Pace(8)
    limits = []
    for _ in range(60):
        parallel = pace.limit
        pace.record(parallel, 10.0 * max(1.0, parallel / processors))
        limits.append(pace.limit)
    settled = limits[20:]
    best = min(processors, 8)
    assert {best} <= set(settled) <= {best, best + 1}


def test_starts_that_were_not_at_the_limit_say_nothing() -> None:
    pace = Pace(8)
    pace.record(1, 10.0)
    assert pace.limit == 2
    for _ in range(10):
        pace.record(1, 10.0)
    assert pace.limit == 2


def test_it_never_stops() -> None:
    pace = Pace(2)
    for seconds in (0.0, 1e9, 0.0, 1e9):
        pace.record(pace.limit, seconds)
        assert 1 <= pace.limit <= 2
