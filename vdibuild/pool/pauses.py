"""Keeps Python's garbage collector from holding up those who wait."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Leave what there is now out of all collections to come.

    Modules, models and compiled statements stay as long as the process does; to go through all of them again
    takes tens of milliseconds, and whoever asks just then waits so much longer.
    """
    gc.collect()
    gc.freeze()
