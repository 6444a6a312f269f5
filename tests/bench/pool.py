"""The pool's figures: how long stations wait, what the relay costs, how soon the next machine is clean.

    python -m tests.bench.pool [--part PART] [--image IMAGE]

Parts: signals, relay, refill, rivals; by default all of them, in this order. Each is a module of its own,
which says what it measures; its tables go between its own marks of docs/benchmarks.md. refill takes an image
of the site that has a version, by default the first. refill and rivals need root.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import refill, relay, rivals, signals
from tests.bench.golden import this_machine
from tests.bench.report import Rows, write
from vdibuild import site as sites

_PROJECT = Path(__file__).parents[2]
_DOCUMENT = _PROJECT / "docs/benchmarks.md"


def main(only: str | None, image: str | None) -> None:
    """Measure all parts or only one, print their tables, and put them into the document."""
    site = sites.load(_PROJECT / sites.DEFAULT_NAME)
    name, _ = site.image(image)
    measures: dict[str, Callable[[], list[Rows]]] = {
        "signals": lambda: [signals.measure()],
        "relay": relay.measure,
        "refill": lambda: [refill.measure(site, name)],
        "rivals": rivals.measure,
    }
    for part in [only] if only else measures:
        machine = this_machine()
        tables = measures[part]()
        when, load = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", os.getloadavg()[0]
        where = f"{machine['processor']}, {machine['system']}, kernel {machine['kernel']}"
        said = f"Measured on {when}; {where}; load before {machine['load before']}, after {load:.1f}."
        write(tables, said, _DOCUMENT, f"bench.pool.{part}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["signals", "relay", "refill", "rivals"])
    parser.add_argument("--image")
    given = parser.parse_args()
    main(given.part, given.image)
