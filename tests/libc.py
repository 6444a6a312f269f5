"""Calls of the C library that Python has from 3.12 on only."""

from __future__ import annotations

import ctypes
import os

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> None:
    """Call a function that returns 0. Raises OSError."""
    if getattr(_LIBRARY, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
