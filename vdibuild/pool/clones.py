"""Makes machines and destroys them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where a machine shows its screen: SPICE on a unix socket, with a password that repr() hides."""

    socket: Path
    password: str

    def __repr__(self) -> str:
        return f"Endpoint({self.socket})"
