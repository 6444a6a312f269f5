"""What a machine is made of, written down before it is made: so that all of it can be taken back.

    STATE/NAME.json    what is being made, or taken back; not there for a machine that is finished
    STATE/NAME.lock    held by whoever makes or removes a machine of that name

A finished machine carries the same words in its domain's metadata: our mark. Nothing that neither a journal
nor a mark names is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vdibuild import output
from vdibuild.errors import BusyError, InputError

Part = Literal["volume", "network", "dns", "domain"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DnsEntry(_Model):
    """A machine's names in a name server. name: in full. key: the file with the TSIG key."""

    server: str
    port: int
    zone: str
    reverse: str
    key: str
    name: str
    address: str
    ttl: int


class Made(_Model):
    """A machine. parts: what there may be of it. uri: the libvirt it is on. volume: its name in the pool.

    network: libvirt's, empty for a bridge. address: empty where DHCP gives any. host: its name in full.
    """

    name: str
    uuid: str
    uri: str
    image: str
    version: str
    pool: str
    volume: str
    network: str
    mac: str
    address: str
    host: str
    dns: DnsEntry | None
    parts: tuple[Part, ...] = ()


class Journal:
    """The journal of one name, whose lock is held. written: what this run wrote last, forgotten or not."""

    def __init__(self, file: Path) -> None:
        self.written: Made | None = None
        self._file = file

    def read(self) -> Made | None:
        """What an earlier run was at, or None. Raises InputError when the file is damaged."""
        try:
            return Made.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise InputError(
                self._file, None, "is damaged", "see what it names with virsh, and remove it"
            ) from error

    def write(self, made: Made) -> None:
        """Write it down; on return it is on the disk itself."""
        self.written = made
        output.replace(self._file, made.model_dump_json(indent=2))

    def forget(self) -> None:
        """It is finished, or all is taken back."""
        output.under_way(self._file).unlink(missing_ok=True)  # of an interrupted `write`
        self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(state: Path, name: str) -> Iterator[Journal]:
    """The journal of a name, for one run at a time. Raises BusyError while another one has it."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another run works on the machine {name}", "wait for it to end") from None
        file = state / f"{name}.json"
        output.under_way(file).unlink(missing_ok=True)  # of a run that was killed while it wrote
        yield Journal(file)


def unfinished(state: Path) -> list[str]:
    """The names of which there is a journal: of runs under way, or that were killed."""
    written = {file.stem for file in state.glob("*.json")}
    # The first thing that a killed run wrote may not have its name yet.
    return sorted(written | {file.name[1:].removesuffix(".json.new") for file in state.glob(".*.json.new")})


def under_way(state: Path) -> Iterator[Made]:
    """What is being made, or was when its run was killed."""
    for name in unfinished(state):
        if (made := Journal(state / f"{name}.json").read()) is not None:
            yield made
