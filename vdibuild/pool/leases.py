"""Which machines there are, in which state, and who had them: one table, every transition atomic.

A machine is made for one lease and no other, so both share one name, a UUID:

               paused
                 ▲│
                 │▼
    starting ──► clean ──► offered ──► in use
        │          │          │           │
        └──────────┴─────┬────┴───────────┘
                         ▼
                       dirty ──► gone

What is written here comes before what is done: a machine is `starting` before it is made, `offered` before
anyone hears of it, `dirty` before it is destroyed, `gone` only after. No arrow leads back from `offered`, so
that a machine that was offered is never offered again, whatever is killed when. A `paused` machine, which
can end as well, is the administrator's: until he resumes or ends it nobody gets it. Rows stay after their
machine: they are the history of who had what, when, and for how long.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError

from vdibuild.errors import HostError, VdibuildError


class State(StrEnum):
    """What a machine is at."""

    STARTING = "starting"
    CLEAN = "clean"
    PAUSED = "paused"
    OFFERED = "offered"
    IN_USE = "in use"
    DIRTY = "dirty"
    GONE = "gone"


class Mode(StrEnum):
    """What a pool is doing: serving; paused (nobody gets a machine, nothing else changes); draining (nobody
    gets one, sessions go on to their end, clean machines are destroyed).
    """

    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"


UNUSED = (State.STARTING, State.CLEAN, State.PAUSED)
"""The states of a machine that nobody was offered."""

USABLE = (*UNUSED, State.OFFERED, State.IN_USE)
"""The states of a machine that has not ended."""

MAC_PREFIX = "52:54:00"
"""How the MAC addresses of machines begin; three more bytes tell them apart."""

_MAC_TRIES = 20
_BUSY_SECONDS = 5.0


@dataclass(frozen=True)
class Machine:
    """A machine, and the lease it was made for; times are in UTC, None for what has not happened.

    lease: a UUID, also the domain's. image, version: what it is a clone of. station: who got it, by the name
    their token or certificate gives them, else their address. address: where its client linked from. reason:
    why it ended. failed: it never became clean. bytes_in, bytes_out: what its client sent and received.
    """

    lease: str
    pool: str
    state: State
    image: str
    version: str
    mac: str
    station: str | None
    address: str | None
    reason: str | None
    failed: bool
    started: datetime
    cleaned: datetime | None
    paused: datetime | None
    offered: datetime | None
    linked: datetime | None
    ended: datetime | None
    removed: datetime | None
    bytes_in: int | None
    bytes_out: int | None

    @property
    def name(self) -> str:
        """Its name for people and for libvirt."""
        return machine_name(self.pool, self.lease)


@dataclass(frozen=True)
class Sizing:
    """What an administrator set for a pool while it runs; None: what the site file says."""

    mode: Mode = Mode.SERVING
    clean: int | None = None
    maximum: int | None = None


@dataclass(frozen=True)
class Totals:
    """How many machines were ever started, did not become clean, were offered, were used."""

    started: int
    failed: int
    offered: int
    linked: int


def machine_name(pool: str, lease: str) -> str:
    """The name of a lease's machine: the pool's, and enough of the lease to tell its machines apart."""
    return f"{pool}-{lease[:8]}"


class _Moment(sql.types.TypeDecorator[datetime]):
    """A time in UTC: SQLite keeps no zone."""

    impl = sql.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sql.Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value else None

    def process_result_value(self, value: datetime | None, dialect: sql.Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


_metadata = sql.MetaData()

_pools = sql.Table(
    "pools",
    _metadata,
    sql.Column("name", sql.String(63), primary_key=True),
    sql.Column("mode", sql.String(16), nullable=False),
    sql.Column("clean", sql.Integer),
    sql.Column("maximum", sql.Integer),
)

_machines = sql.Table(
    "machines",
    _metadata,
    sql.Column("lease", sql.String(36), primary_key=True),
    sql.Column("pool", sql.String(63), sql.ForeignKey("pools.name"), nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("image", sql.String(63), nullable=False),
    sql.Column("version", sql.String(32), nullable=False),
    sql.Column("mac", sql.String(17), nullable=False),
    sql.Column("station", sql.String(255)),
    sql.Column("address", sql.String(64)),
    sql.Column("reason", sql.String(255)),
    sql.Column("failed", sql.Boolean, nullable=False),
    sql.Column("started", _Moment, nullable=False),
    sql.Column("cleaned", _Moment),
    sql.Column("paused", _Moment),
    sql.Column("offered", _Moment),
    sql.Column("linked", _Moment),
    sql.Column("ended", _Moment),
    sql.Column("removed", _Moment),
    sql.Column("bytes_in", sql.BigInteger),
    sql.Column("bytes_out", sql.BigInteger),
    sql.CheckConstraint("state IN ({})".format(", ".join(f"'{state}'" for state in State)), name="state"),
    sql.Index("machines_by_time", "pool", "started"),
)

_living = _machines.c.state != State.GONE
# Small however long the history grows, and what keeps two living machines from one address.
sql.Index(
    "machines_living", _machines.c.pool, _machines.c.state, sqlite_where=_living, postgresql_where=_living
)
sql.Index("machines_mac", _machines.c.mac, unique=True, sqlite_where=_living, postgresql_where=_living)

# One statement for any number of machines: preparing it takes longer than it does.
_offering = sql.update(_machines).where(
    _machines.c.lease == sql.bindparam("chosen"), _machines.c.state == State.CLEAN
)


class Leases:
    """The machines and leases of all pools in a database.

    url: as SQLAlchemy writes it, such as sqlite:////var/lib/vdibuild/pool/leases.db; its tables are made when
    they are missing. clock: what tells the time. Every method is one transaction. Raises HostError when the
    database cannot be used.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        try:
            self._readers = sql.create_engine(url)
            if self._readers.dialect.name == "sqlite":
                _prepare_sqlite(self._readers)
            self._writers = self._readers.execution_options(writes=True)
            _metadata.create_all(self._writers)
            lacking = _lacking(self._readers)
        except (DBAPIError, sql.exc.ArgumentError, ImportError, OSError) as error:
            shown = _shown(url)
            raise HostError(
                f"the pool's database {shown} cannot be used: {error}", "see pools: database in the site file"
            ) from None
        if lacking:
            self.close()
            raise HostError(
                f"the pool's database {_shown(url)} was made by another vdibuild: it has no {lacking}",
                "clear the pool with that one, and move the database away: it keeps the history",
            )

    def close(self) -> None:
        """Let the database go."""
        self._readers.dispose()

    def tidy(self) -> None:
        """Move what was committed to the database's own file, where the database leaves that to us (SQLite).

        It waits for the disk, and nobody waits for it: to be called now and then, in a thread. Raises
        HostError.
        """
        if self._readers.dialect.name != "sqlite":
            return
        connection = self._readers.raw_connection()
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            raise HostError(f"the pool's database {self._readers.url} failed: {error}") from None
        finally:
            connection.close()

    def sizing(self, pool: str) -> Sizing:
        """What is set for a pool now."""
        with self._transaction(self._readers) as connection:
            row = connection.execute(sql.select(_pools).where(_pools.c.name == pool)).one_or_none()
        return Sizing(Mode(row.mode), row.clean, row.maximum) if row else Sizing()

    def set_mode(self, pool: str, mode: Mode) -> None:
        """Pause a pool, drain it, or let it serve again."""
        self._set(pool, mode=mode)

    def resize(self, pool: str, clean: int | None, maximum: int | None) -> None:
        """Set how many clean machines a pool keeps, and how many it may have; None: as the site file says."""
        self._set(pool, clean=clean, maximum=maximum)

    def start(self, pool: str, image: str, version: str, maximum: int) -> Machine | None:
        """Enter a new machine as starting, unless the pool has `maximum` machines."""
        lease = str(uuid.uuid4())
        for _ in range(_MAC_TRIES):
            try:
                with self._transaction(self._writers) as connection:
                    # The pool's row is the lock under which its machines are counted.
                    self._lock(connection, pool)
                    if self._count(connection, pool) >= maximum:
                        return None
                    values = {
                        "lease": lease,
                        "pool": pool,
                        "state": State.STARTING,
                        "image": image,
                        "version": version,
                        "mac": f"{MAC_PREFIX}:{secrets.token_bytes(3).hex(':')}",
                        "failed": False,
                        "started": self._clock(),
                    }
                    connection.execute(sql.insert(_machines).values(values))
                return self.get(lease)
            except IntegrityError:
                continue  # another living machine has that MAC
        raise VdibuildError(f"no free MAC was found for a machine of {pool} in {_MAC_TRIES} tries")

    def clean(self, lease: str) -> bool:
        """The machine answers: starting to clean. Says whether it was starting."""
        return self._move(lease, (State.STARTING,), State.CLEAN, cleaned=self._clock())

    def fail(self, lease: str, reason: str) -> bool:
        """The machine did not become clean: starting to dirty. Says whether it was starting."""
        return self._end(lease, (State.STARTING,), reason, failed=True)

    def pause(self, lease: str) -> bool:
        """Nobody gets the machine for now: clean to paused. Says whether it was clean."""
        return self._move(lease, (State.CLEAN,), State.PAUSED, paused=self._clock())

    def resume(self, lease: str) -> bool:
        """The machine can be had again: paused to clean. Says whether it was paused."""
        return self._move(lease, (State.PAUSED,), State.CLEAN, paused=None)

    def offer(self, pool: str, stations: Sequence[str]) -> list[Machine]:
        """Offer a machine to each of these stations, in their order, those first that have been clean for
        longest. Returns as many as there are, none when the pool does not serve.
        """
        query = (
            sql.select(_machines)
            .where(_machines.c.pool == pool, _machines.c.state == State.CLEAN)
            .order_by(_machines.c.cleaned, _machines.c.lease)
            .limit(len(stations))
            # Another broker's, on a database that lets two look at once; SQLite lets one write at a time.
            .with_for_update(skip_locked=True)
        )
        now = self._clock()
        with self._transaction(self._writers) as connection:
            if not self._serves(connection, pool):
                return []
            rows = connection.execute(query).all()
            chosen = [
                {"chosen": row.lease, "station": station[:255]}
                for row, station in zip(rows, stations, strict=False)
            ]
            if chosen:
                # No one else can change them before the transaction's end: they are locked.
                connection.execute(_offering.values(state=State.OFFERED, offered=now), chosen)
        return [
            replace(_machine(row), state=State.OFFERED, station=values["station"], offered=now)
            for row, values in zip(rows, chosen, strict=True)
        ]

    def link(self, lease: str, address: str) -> bool:
        """The station's client linked: offered to in use. Says whether it was offered."""
        return self._move(lease, (State.OFFERED,), State.IN_USE, linked=self._clock(), address=address[:64])

    def in_use(self, lease: str) -> bool:
        """Whether a lease is one whose session goes on."""
        query = sql.select(_machines.c.state).where(_machines.c.lease == lease)
        with self._transaction(self._readers) as connection:
            return connection.execute(query).scalar_one_or_none() == State.IN_USE

    def end(self, lease: str, reason: str, states: Sequence[State] = USABLE) -> bool:
        """The machine is of no further use: from any of `states` to dirty. Says whether it was in one."""
        return self._end(lease, states, reason, failed=False)

    def traffic(self, lease: str, bytes_in: int, bytes_out: int) -> None:
        """Note what a session moved."""
        with self._transaction(self._writers) as connection:
            connection.execute(
                sql.update(_machines)
                .where(_machines.c.lease == lease)
                .values(bytes_in=bytes_in, bytes_out=bytes_out)
            )

    def gone(self, lease: str) -> bool:
        """Nothing of the machine is left: dirty to gone. Says whether it was dirty."""
        return self._move(lease, (State.DIRTY,), State.GONE, removed=self._clock())

    def get(self, lease: str) -> Machine:
        """A machine by its lease. Raises VdibuildError when there never was one."""
        with self._transaction(self._readers) as connection:
            row = connection.execute(sql.select(_machines).where(_machines.c.lease == lease)).one_or_none()
        if row is None:
            raise VdibuildError(f"there is no lease {lease}")
        return _machine(row)

    def find(self, pool: str, name: str) -> Machine:
        """A living machine by its name or lease. Raises VdibuildError when there is none."""
        living = self.living(pool)
        for machine in living:
            if name in (machine.name, machine.lease):
                return machine
        there = ", ".join(machine.name for machine in living)
        raise VdibuildError(f"{pool} has no machine {name}", f"there are: {there or 'none'}")

    def living(self, pool: str) -> list[Machine]:
        """The machines of a pool that are not gone, the oldest first."""
        with self._transaction(self._readers) as connection:
            rows = connection.execute(
                sql.select(_machines)
                .where(_machines.c.pool == pool, _machines.c.state != State.GONE)
                .order_by(_machines.c.started, _machines.c.lease)
            ).all()
        return [_machine(row) for row in rows]

    def history(self, pool: str, limit: int, station: str | None = None) -> list[Machine]:
        """The leases of a pool that were offered to someone, the newest first. station: only theirs."""
        query = sql.select(_machines).where(_machines.c.pool == pool, _machines.c.offered.is_not(None))
        if station is not None:
            query = query.where(sql.or_(_machines.c.station == station, _machines.c.address == station))
        with self._transaction(self._readers) as connection:
            rows = connection.execute(query.order_by(_machines.c.offered.desc()).limit(limit)).all()
        return [_machine(row) for row in rows]

    def totals(self, pool: str) -> Totals:
        """How many machines a pool ever had."""
        count = sql.func.count
        failed = sql.func.sum(sql.case((_machines.c.failed, 1), else_=0))
        query = sql.select(count(), failed, count(_machines.c.offered), count(_machines.c.linked)).where(
            _machines.c.pool == pool
        )
        with self._transaction(self._readers) as connection:
            started, failures, offered, linked = connection.execute(query).one()
        return Totals(started, failures or 0, offered, linked)

    def attempts(self, pool: str, version: str, limit: int) -> list[bool]:
        """How the newest starts of a version's clones went, the newest first: whether each became clean."""
        tried = sql.or_(_machines.c.cleaned.is_not(None), _machines.c.failed)
        with self._transaction(self._readers) as connection:
            rows = connection.execute(
                sql.select(_machines.c.failed)
                .where(_machines.c.pool == pool, _machines.c.version == version, tried)
                .order_by(sql.func.coalesce(_machines.c.cleaned, _machines.c.ended).desc())
                .limit(limit)
            ).all()
        return [not row.failed for row in rows]

    def proven(self, pool: str, image: str, besides: str) -> str | None:
        """The version of an image whose clone became clean last, of all versions but one."""
        with self._transaction(self._readers) as connection:
            found = connection.execute(
                sql.select(_machines.c.version)
                .where(
                    _machines.c.pool == pool,
                    _machines.c.image == image,
                    _machines.c.version != besides,
                    _machines.c.cleaned.is_not(None),
                )
                .order_by(_machines.c.cleaned.desc())
                .limit(1)
            ).scalar_one_or_none()
        return None if found is None else str(found)

    @contextlib.contextmanager
    def _transaction(self, engine: sql.Engine) -> Iterator[sql.Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            shown = engine.url.render_as_string(hide_password=True)
            raise HostError(f"the pool's database {shown} failed: {error.orig}") from None

    def _set(self, pool: str, **values: Any) -> None:
        with self._transaction(self._writers) as connection:
            self._lock(connection, pool)
            connection.execute(sql.update(_pools).where(_pools.c.name == pool).values(values))

    def _lock(self, connection: sql.Connection, pool: str) -> None:
        """Hold the pool's row to the end of the transaction; it is made when there is none."""
        query = sql.select(_pools.c.name).where(_pools.c.name == pool).with_for_update()
        if connection.execute(query).one_or_none() is None:
            connection.execute(sql.insert(_pools).values(name=pool, mode=Mode.SERVING))

    def _count(self, connection: sql.Connection, pool: str) -> int:
        count = sql.select(sql.func.count()).select_from(_machines)
        found = connection.execute(count.where(_machines.c.pool == pool, _machines.c.state != State.GONE))
        return int(found.scalar_one())

    def _serves(self, connection: sql.Connection, pool: str) -> bool:
        mode = connection.execute(sql.select(_pools.c.mode).where(_pools.c.name == pool)).scalar_one_or_none()
        return mode == Mode.SERVING

    def _end(self, lease: str, states: Sequence[State], reason: str, *, failed: bool) -> bool:
        values = {"reason": reason[:255], "ended": self._clock(), "failed": failed}
        return self._move(lease, states, State.DIRTY, **values)

    def _move(self, lease: str, before: Iterable[State], after: State, **values: Any) -> bool:
        with self._transaction(self._writers) as connection:
            return self._changed(connection, lease, before, after, values)

    def _changed(
        self,
        connection: sql.Connection,
        lease: str,
        before: Iterable[State],
        after: State,
        values: dict[str, Any],
    ) -> bool:
        """Make a transition, if the machine is still in one of the states it starts from."""
        changed = connection.execute(
            sql.update(_machines)
            .where(_machines.c.lease == lease, _machines.c.state.in_(list(before)))
            .values(state=after, **values)
        )
        return changed.rowcount == 1


def _machine(row: sql.Row[Any]) -> Machine:
    values = dict(row._mapping)
    return Machine(**{**values, "state": State(values["state"])})


def _lacking(engine: sql.Engine) -> str:
    """The first column that a database does not have, as `table.column`; empty where it has them all."""
    known = sql.inspect(engine)
    for table in _metadata.sorted_tables:
        there = {column["name"] for column in known.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                return f"{table.name}.{column.name}"
    return ""


def _shown(url: str) -> str:
    """A database's URL without its password."""
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except sql.exc.ArgumentError:
        return "URL"


def _prepare_sqlite(engine: sql.Engine) -> None:
    """Have SQLite begin transactions when we say so, and keep its file to its owner."""
    if engine.url.database and engine.url.database != ":memory:":
        # Who sat where and when is nobody else's business.
        Path(engine.url.database).touch(mode=0o600)

    @sql.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        # Python's own idea of when a transaction begins would let two writers read the same state.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")
        cursor.execute("PRAGMA foreign_keys = ON")
        # Readers do not wait for writers. A commit survives any kill; a loss of power may undo the last
        # ones, but takes all machines with it, and the next start finds that out.
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        # So no commit ever waits for the disk; see `tidy`. The last one to close the database does it too.
        cursor.execute("PRAGMA wal_autocheckpoint = 0")
        cursor.close()

    @sql.event.listens_for(engine, "begin")
    def begun(connection: sql.Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
