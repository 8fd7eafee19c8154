"""The way to the database: SQLite or PostgreSQL, its transactions and its clock."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Double,
    Executable,
    RowMapping,
    cast,
    event,
    extract,
    func,
    literal,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from flux_ray.errors import StoreLost
from flux_ray.jobs.migrations.schema import migrate

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
# How long a statement waits for those of other processes.
BUSY_TIMEOUT_S = 30
SWITCH_TRIES = 10
SWITCH_PAUSE_S = 0.1
# Of the day on which the seconds begin that everybody else counts.
JULIAN_DAY_OF_1970 = 2440587.5
DAY_S = 86400.0
# One that is cut off in its turn is not to keep the others out for ever.
BEGIN_TURN = (
    f"BEGIN; SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s';"
    f" SET LOCAL idle_in_transaction_session_timeout = '{BUSY_TIMEOUT_S}s'"
)
# Gateways that start at once make or change the tables one after another.
CREATION_LOCK = 7_355_608

# It logs what each statement holds.
logging.getLogger("aiosqlite").setLevel(logging.WARNING)

Clock = Callable[[], float]


class Database:
    """Connections to one database.

    Its clock says when what is kept has expired and when a pause is over, for it is one for all
    gateways. It may be set: no lease of a job goes by it, and no pause becomes longer. `clock`
    takes its place in tests.
    """

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self._url = url_for(url)
        self._clock = clock
        self._engine = engine_for(self._url)
        self._statements: set[asyncio.Task[Sequence[RowMapping]]] = set()

    @property
    def now(self) -> ColumnElement[float]:
        """The time of the statement in which it stands, in seconds since 1970."""
        if self._clock is not None:
            return literal(self._clock(), Double)
        if self.is_sqlite:
            return (func.julianday("now", type_=Double) - JULIAN_DAY_OF_1970) * DAY_S
        # Not the clock of each row: an index could not be used.
        return cast(extract("epoch", func.statement_timestamp()), Double)

    @property
    def is_sqlite(self) -> bool:
        """A file, not a server."""
        return self._engine.dialect.name == "sqlite"

    async def create(self) -> None:
        """Make the tables, or bring them to what this release needs. Raises StoreLost."""
        for _ in range(SWITCH_TRIES if self.is_sqlite else 0):
            try:
                return await self._create()
            except StoreLost:
                # Several that switch a new file to WAL at once do not wait for each other.
                await asyncio.sleep(SWITCH_PAUSE_S)
        await self._create()

    async def _create(self) -> None:
        if self.is_sqlite and self._url.database:
            # Prompts and secrets are for no other user of the machine.
            folder = Path(self._url.database).parent
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with self.connect() as connection:
            if self.is_sqlite:
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                await connection.exec_driver_sql("BEGIN")
                await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({CREATION_LOCK})")
            await connection.run_sync(migrate)
            await connection.exec_driver_sql("COMMIT")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection that commits after every statement. Raises StoreLost."""
        try:
            async with self._engine.connect() as connection:
                yield connection
        except (OperationalError, InterfaceError, InternalError, PoolTimeoutError) as error:
            raise StoreLost(str(error)) from error

    async def execute(self, statement: Executable, turn: str | None = None) -> Sequence[RowMapping]:
        """Its rows. Raises StoreLost.

        Of statements with the same `turn`, each sees what those before it did.

        Whoever is cancelled leaves the statement to its end: cut off in the middle, a connection
        would be left over with its thread.
        """
        task = asyncio.create_task(self._execute(statement, turn))
        self._statements.add(task)
        task.add_done_callback(self._statements.discard)
        task.add_done_callback(look_at)
        return await asyncio.shield(task)

    async def first(self, statement: Executable, turn: str | None = None) -> RowMapping | None:
        """Its one row, if there is one; `turn` as for execute. Raises StoreLost."""
        rows = await self.execute(statement, turn)
        return rows[0] if rows else None

    async def _execute(self, statement: Executable, turn: str | None) -> Sequence[RowMapping]:
        async with self.connect() as connection:
            # SQLite has one writer at a time anyway.
            if turn is None or self.is_sqlite:
                return (await connection.execute(statement)).mappings().all()
            await connection.exec_driver_sql(BEGIN_TURN)
            await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(turn))))
            rows = (await connection.execute(statement)).mappings().all()
            await connection.exec_driver_sql("COMMIT")
            return rows

    async def close(self) -> None:
        """Give the connections back, after the last statement."""
        if self._statements:
            await asyncio.wait(tuple(self._statements))
        await self._engine.dispose()


def look_at(task: "asyncio.Task[Any]") -> None:
    """Or asyncio complains of an error that nobody saw: who asked may be gone."""
    if not task.cancelled():
        task.exception()


def url_for(url: str) -> URL:
    """`sqlite:///...` and `postgresql://...`, with the driver that this package uses."""
    parsed = make_url(url)
    if parsed.drivername not in DRIVERS:
        raise ValueError(f"database: {parsed.drivername} is neither sqlite nor postgresql")
    parsed = parsed.set(drivername=DRIVERS[parsed.drivername])
    if parsed.drivername == DRIVERS["sqlite"] and parsed.database:
        return parsed.set(database=str(Path(parsed.database).expanduser()))
    return parsed


def engine_for(url: URL) -> AsyncEngine:
    """Statements are transactions, but for turns: no caller leaves one open or upgrades its lock.

    A connection that the server ended is replaced before it is used. Errors are logged, and are not
    to tell what a statement holds.
    """
    create = partial(create_async_engine, url, isolation_level="AUTOCOMMIT", hide_parameters=True)
    if url.drivername != DRIVERS["sqlite"]:
        return create(pool_pre_ping=True)
    engine = create(connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine.sync_engine, "connect", set_up_sqlite)
    return engine


def set_up_sqlite(connection: Any, record: object) -> None:
    """What is committed is on the disk: the default may be built otherwise."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
