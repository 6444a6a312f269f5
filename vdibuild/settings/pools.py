"""Pools of one-time machines."""

from __future__ import annotations

from datetime import datetime, time
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, IPvAnyAddress, model_validator

from vdibuild.settings.values import Name, Port, Settings, Size, TimeOfDay

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = get_args(Day)


class Hours(Settings):
    """Hours of the week in which another number of machines is kept ready."""

    days: list[Day] = Field(default_factory=lambda: list(_DAYS))
    """The days, such as [mon, tue]; by default all."""
    begin: TimeOfDay = Field(alias="from")
    """When it begins, by this host's clock, such as "08:00"."""
    end: TimeOfDay = Field(alias="to")
    """When it ends, such as "18:00"; "00:00" is the end of the day."""
    clean: Annotated[int, Field(ge=0)]
    """How many clean machines are kept ready."""

    def hold(self, moment: datetime) -> bool:
        """Whether it is that time."""
        if _DAYS[moment.weekday()] not in self.days:
            return False
        return self.begin <= moment.time() and (self.end == time() or moment.time() < self.end)

    @model_validator(mode="after")
    def _in_order(self) -> Hours:
        if self.end != time() and self.end <= self.begin:
            raise ValueError("the end is not after the beginning; give two entries for a night")
        return self


class Desk(Settings):
    """Where stations that are known by a token or a certificate get a .vv file, by HTTPS."""

    port: Annotated[int, Field(ge=0, le=65535)] = 5908
    """The port."""
    certificate: Path
    """This host's certificate and those that lead to the CA, PEM; relative to the site file."""
    key: Path
    """The certificate's private key, PEM."""
    ca: Path
    """The CA's certificate, which stations check the relay's by, PEM."""
    host: str
    """The name of this host in the relay's certificate, by which stations find it."""
    tls_port: Port = 5907
    """The relay's port for TLS."""
    stations: Path = Path("stations")
    """The known stations, as pool.enrol writes them."""
    client_ca: Path | None = None
    """The CA of stations that have certificates."""


class Reach(Settings):
    """Something that a pool's machines may reach; without ports, by whatever protocol."""

    address: IPv4Network
    """An address, or a network such as 10.20.0.0/16; only an address of its own opens this host."""
    tcp: list[Port] = Field(default_factory=list)
    """TCP ports, such as [3128]."""
    udp: list[Port] = Field(default_factory=list)
    """UDP ports, such as [53]."""


class Pool(Settings):
    """A pool of one-time machines, all clones of one image."""

    image: Name
    """The golden image."""
    clean: Annotated[int, Field(ge=0)] = 2
    """How many clean machines are kept ready."""
    hours: list[Hours] = Field(default_factory=list)
    """Hours of the week in which that number is another one; the first that holds counts."""
    maximum: Annotated[int, Field(ge=1)] = 8
    """How many machines there may be, those in use included."""
    memory: Size = Field(default="2GiB", validate_default=True)
    """Memory of a machine."""
    cores: Annotated[int, Field(ge=1)] = 2
    """Processors of a machine."""
    disk: Size = Field(default="4GiB", validate_default=True)
    """How much a machine may write before it is destroyed."""
    video: Literal["virtio", "qxl"] = "virtio"
    """The graphics card."""
    network: str | None = None
    """The libvirt network of the machines; without it they have none."""
    reach: list[Reach] = Field(default_factory=list)
    """What they may reach, such as a proxy and DNS: by default nothing, neither this host nor each other."""
    boot_seconds: Annotated[int, Field(gt=0)] = 600
    """How long a machine may take until its guest agent answers."""
    offer_seconds: Annotated[int, Field(ge=2, le=600)] = 10
    """How long a station has to connect to the machine it was offered."""
    session_minutes: Annotated[int, Field(gt=0)] | None = None
    """How long a session may last, by default for ever; the station is warned five minutes before its end."""
    idle_minutes: Annotated[int, Field(gt=0)] | None = None
    """How long nobody may touch keyboard and mouse, by default for ever; a warning comes a minute before."""
    directory: Path = Path("/var/lib/vdibuild/pools")
    """Where machines and leases are kept, in a directory for each pool; relative to the site file."""
    database: str | None = None
    """Where leases are kept, as a SQLAlchemy URL; by default in SQLite, in the pool's directory."""
    relay: Path = Path("relay.sock")
    """The control socket of the relay, which carries SPICE between stations and machines; relative to the
    pool's directory.
    """
    listen: IPvAnyAddress = Field(default="0.0.0.0", validate_default=True)  # noqa: S104 (stations are elsewhere)
    """The address of this host in the stations' network."""
    signal_port: Annotated[int, Field(ge=0, le=65535)] = 5905
    """The port on which old clients wait for a machine."""
    spice_port: Port | None = 5906
    """The port on which they then see it, without TLS; null for none."""
    desk: Desk | None = None
    """Where known stations get a .vv file; by default nowhere."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The port, on 127.0.0.1 only, of /metrics for Prometheus; by default none."""
    waiting_per_address: Annotated[int, Field(ge=1)] = 8
    """How many stations may wait at one address: more than one only where stations share an address."""
    reserve_memory: Size = Field(default="1GiB", validate_default=True)
    """Memory that machines leave to the host."""
    reserve_disk: Size = Field(default="2GiB", validate_default=True)
    """Space that machines leave free."""

    @model_validator(mode="after")
    def _has_a_way_in(self) -> Pool:
        if self.spice_port is None and self.desk is None:
            raise ValueError("without spice_port and desk no station can see a machine")
        if self.reach and self.network is None:
            raise ValueError("without a network machines reach nothing: give network, or leave out reach")
        return self

    def clean_at(self, moment: datetime) -> int:
        """How many clean machines are kept ready at that time."""
        return next((hours.clean for hours in self.hours if hours.hold(moment)), self.clean)
