"""What a pool asks of a hypervisor: make a machine, destroy it, say what there is.

One implementation stands under it, `overlay`; restoring machines from a template's memory can be a second.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vdibuild.pool.leases import Machine


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where a machine shows its screen: SPICE on a unix socket, with a password that repr() hides."""

    socket: Path
    password: str

    def __repr__(self) -> str:
        return f"Endpoint({self.socket})"


@dataclass(frozen=True)
class Found:
    """Something that exists of a machine. endpoint: where it can be seen, None when it does not run. trouble:
    why it must not go on, empty when it may.
    """

    endpoint: Endpoint | None
    trouble: str = ""


class Cloner(Protocol):
    """Makes one pool's machines and destroys them. Every call raises VdibuildError when it fails."""

    async def promoted(self) -> str:
        """The version of the pool's image that new machines should be clones of."""

    async def keep(self, versions: Set[str]) -> None:
        """Keep these versions of the image from being removed, and no others."""

    async def room(self) -> int:
        """How many more machines this host has memory and space for."""

    async def make(self, machine: Machine) -> Endpoint:
        """Make a machine, and wait until it answers."""

    async def finish(self, machine: Machine) -> Endpoint:
        """Wait until a machine answers that somebody began to make, and that runs."""

    async def destroy(self, lease: str) -> None:
        """Leave nothing of a machine, whatever there is of it, even if there is nothing."""

    async def found(self) -> dict[str, Found]:
        """Everything that carries this pool's mark, by lease: running, or left of a machine."""

    async def tell(self, lease: str, text: str) -> None:
        """Show a message to whoever uses a machine."""
