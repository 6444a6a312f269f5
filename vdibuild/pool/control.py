"""What the broker and the relay say to each other: one JSON object per line, over a unix socket.

The broker's lines are commands, the relay's are replies and events. An event carries a number, which only
grows, and is repeated to a broker that connects later until one has acknowledged it. Each lease that was
offered ends in exactly one `ended`, whether a client came or not. A connection gets events from its first
command on; a broker begins with `state`, which tells it what happened while it was away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from vdibuild.errors import VdibuildError

LINE_BYTES = 1 << 16
"""How long a line of the broker may be; a longer one ends the connection."""

Lease = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
Secret = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[!-~]+$")]
"""A SPICE password: at most 60 bytes (SPICE_MAX_PASSWORD_LENGTH in spice-protocol's protocol.h)."""


class ControlError(VdibuildError):
    """A line that is not of this protocol."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def line(self) -> bytes:
        """The message as it is sent, secrets included, with its line feed."""
        return self.model_dump_json().encode() + b"\n"


class Offer(_Message):
    """Let one client in at a machine: by its address, by a one-time ticket, or by both."""

    command: Literal["offer"] = "offer"
    lease: Lease
    socket: Path
    """The unix socket on which the machine speaks SPICE."""
    password: Secret = Field(repr=False)
    """The machine's own password; no client ever learns it."""
    station: IPvAnyAddress | None = None
    """The address the client comes from; null for any."""
    ticket: Secret | None = Field(default=None, repr=False)
    """The password in the client's .vv file; such a client has to use TLS. null for one that has none."""
    expires: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Seconds until nobody is let in any more."""

    @model_validator(mode="after")
    def _has_a_condition(self) -> Offer:
        if self.station is None and self.ticket is None:
            raise ValueError("an offer is made to a station, or has a ticket")
        return self


class Revoke(_Message):
    """Let nobody in any more for this lease; a session that has begun goes on."""

    command: Literal["revoke"] = "revoke"
    lease: Lease


class End(_Message):
    """End this lease's session, or its offer."""

    command: Literal["end"] = "end"
    lease: Lease
    reason: Annotated[str, Field(max_length=200)]


class GetState(_Message):
    """Tell me every session and offer."""

    command: Literal["state"] = "state"


class Stop(_Message):
    """End every session, and yourself; what ends is told first."""

    command: Literal["stop"] = "stop"


class Acknowledge(_Message):
    """Forget the events up to this number."""

    command: Literal["ack"] = "ack"
    number: Annotated[int, Field(ge=0)]


class Replace(_Message):
    """Hand everything over to the relay that says this, and serve on what has begun.

    Answered as `handover` says; what follows are the ends of the sessions that go on in the old one.
    """

    command: Literal["replace"] = "replace"


class Linked(_Message):
    """A client was let in at a lease's machine."""

    event: Literal["linked"] = "linked"
    number: int = 0
    lease: Lease
    address: str


class Ended(_Message):
    """A lease's session is over, or its offer, which then took no seconds and moved no bytes."""

    event: Literal["ended"] = "ended"
    number: int = 0
    lease: Lease
    reason: str
    seconds: float = 0
    bytes_in: int = 0
    """Bytes from the client to the machine."""
    bytes_out: int = 0
    """Bytes from the machine to the client."""


class Refused(_Message):
    """Links from an address were refused."""

    event: Literal["refused"] = "refused"
    number: int = 0
    address: str
    reason: str
    times: int = 1
    """How often since the last such event."""


class SessionState(_Message):
    """A session as it is now."""

    lease: Lease
    address: str
    seconds: float
    bytes_in: int
    bytes_out: int
    channels: int
    idle: float | None = None
    """Seconds since somebody was seen to type or to move the mouse; null where that is not known."""


class OfferState(_Message):
    """An offer as it is now."""

    lease: Lease
    station: str | None
    ticketed: bool
    expires: float
    """Seconds it has left."""


class State(_Message):
    """The answer to `state`."""

    event: Literal["state"] = "state"
    sessions: list[SessionState]
    offers: list[OfferState]


class Error(_Message):
    """A command could not be done, or a lease's machine does not answer as it should."""

    event: Literal["error"] = "error"
    number: int = 0
    lease: Lease | None = None
    message: str


class HeirloomSession(_Message):
    """A session whose channels live in the relay that hands over; further ones come to the next."""

    lease: Lease
    identifier: int
    machine_identifier: int
    socket: Path
    password: Secret = Field(repr=False)
    ticket: Secret | None = Field(repr=False)
    address: str
    seconds: float
    bytes_in: int
    bytes_out: int


class HeirloomOffer(_Message):
    """An offer that nobody has taken yet."""

    offer: Offer
    common: list[int]
    channel: list[int]


class Estate(_Message):
    """All that a relay knows, for the one that replaces it."""

    event: Literal["estate"] = "estate"
    listeners: list[str]
    """What the sockets that came with it are for, in their order."""
    sessions: list[HeirloomSession]
    offers: list[HeirloomOffer]
    events: list[Annotated[Linked | Ended | Refused | Error, Field(discriminator="event")]]
    number: int
    """The number of the last event."""


Command = Offer | Revoke | End | GetState | Stop | Acknowledge | Replace
Event = Linked | Ended | Refused | Error
Report = Event | State | Estate

_commands: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="command")])
_reports: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="event")])


def command(line: bytes) -> Command:
    """A line of the broker's. Raises ControlError, which quotes nothing of it: it may hold secrets."""
    try:
        return _commands.validate_json(line)
    except ValidationError as error:
        raise ControlError(f"no command: {_explained(error)}") from None


def report(line: bytes) -> Report:
    """A line of the relay's. Raises ControlError."""
    try:
        return _reports.validate_json(line)
    except ValidationError as error:
        raise ControlError(f"no event: {_explained(error)}") from None


def _explained(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)
    )
