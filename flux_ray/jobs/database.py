"""The way to the database: SQLite or PostgreSQL, its transactions, its clock, and its loss.

The file of an SQLite database: made for nobody else's eyes, and known again by its inode.

Secrets that all gateways of a database share: whoever asks first makes them.
"""

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

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
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    DatabaseError,
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from flux_ray.errors import StoreLost
from flux_ray.jobs.migrations.schema import migrate
from flux_ray.jobs.table import SECRETS
from flux_ray.private_files import keep_from_others, make_folder, open_privately

logger = logging.getLogger("ray.serve")

# What SQLite keeps beside it, with the mode of the file itself.
COMPANIONS = ("", "-wal", "-shm")


class FileIdentity(NamedTuple):
    """What a file keeps as long as it is the same one, whatever is written into it."""

    device: int
    inode: int


class DatabaseFile:
    """One file; connections to it never make it, so that none finds an empty one in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make it where it is not there, and close it to others where it is. Raises OSError."""
        make_folder(self.path.parent)
        os.close(open_privately(str(self.path), os.O_RDWR | os.O_CREAT))
        kept = [keep_from_others(Path(f"{self.path}{each}")) for each in COMPANIONS]
        if not all(kept):
            folder = shlex.quote(str(self.path.parent))
            logger.warning(
                "other users of this machine can read the prompts and secrets in %s, whose files"
                " are not ours to change: chmod 700 %s",
                self.path,
                folder,
            )

    def identity(self) -> FileIdentity | None:
        """Return that of the file which is there now; None where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return FileIdentity(found.st_dev, found.st_ino)

    def url_for(self, url: URL) -> URL:
        """Return the URL by which it is opened only if it is there."""
        name = f"file:{quote(str(self.path.absolute()))}"
        return url.set(database=name, query={"mode": "rw", "uri": "true"})


DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
# How long a statement waits for those of other processes.
BUSY_TIMEOUT_S = 30
SWITCH_TRIES = 10
SWITCH_PAUSE_S = 0.1
# Whoever replaces a database or restores its tables is given so long before it is touched.
SETTLE_S = 3.0
# What SQLite says, and PostgreSQL's states, where the tables are not those that were made.
MISSING_WORDS = ("no such table", "no such column", "has no column named")
MISSING_STATES = ("42P01", "42703", "3F000")
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

    One that is deleted, replaced or restored meanwhile is lost: nothing is read from it or written
    to it until `SETTLE_S` later, when the tables are made or brought up to date. `num_renewals`
    counts how often that was, for what was remembered of it.
    """

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self._url = url_for(url)
        self._file: DatabaseFile | None = None
        if self._url.drivername == DRIVERS["sqlite"] and self._url.database:
            self._file = DatabaseFile(Path(self._url.database))
            self._url = self._file.url_for(self._url)
        self._clock = clock
        self._engine = engine_for(self._url)
        # Of their own: where all others wait for whoever writes, a poll does not.
        self._reading_engine = engine_for(self._url, only_reads=True)
        self._statements: set[asyncio.Task[Sequence[RowMapping]]] = set()
        self._identity: FileIdentity | None = None
        self._lost_at_s: float | None = None
        self._renewal = asyncio.Lock()
        self.num_renewals = 0

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
        await self._make_file()
        async with self._connected(self._engine) as connection:
            if self.is_sqlite:
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                await connection.exec_driver_sql("BEGIN")
                await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({CREATION_LOCK})")
            await connection.run_sync(migrate)
            await connection.exec_driver_sql("COMMIT")
        self._lost_at_s = None

    async def _make_file(self) -> None:
        """Make it where it is not there; it is the one that is meant from now on."""
        if self._file is None:
            return
        try:
            await asyncio.to_thread(self._file.make)
        except OSError as error:
            raise StoreLost(str(error)) from error
        self._identity = self._file.identity()

    @asynccontextmanager
    async def connect(self, *, only_reads: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection that commits after every statement. Raises StoreLost."""
        await self._look()
        engine = self._reading_engine if only_reads else self._engine
        async with self._connected(engine) as connection:
            yield connection

    @asynccontextmanager
    async def _connected(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        identity = self._identity
        try:
            async with engine.connect() as connection:
                try:
                    yield connection
                finally:
                    has_moved = self._has_moved(identity)
                    if has_moved:
                        await connection.invalidate()
            if has_moved:
                # What was written went into a file that nobody will find.
                raise StoreLost("the job database was replaced meanwhile")
        except (InterfaceError, PoolTimeoutError) as error:
            raise StoreLost(str(error)) from error
        except DatabaseError as error:
            if has_lost_tables(error):
                self._lose(str(error.orig))
            elif not isinstance(error, (OperationalError, InternalError)):
                raise
            raise StoreLost(str(error)) from error

    async def _look(self) -> None:
        """Return if the database is the one that was made; else make it so when it is time."""
        if self._identity is None:
            await self._make_file()
        self._has_moved(self._identity)
        if self._lost_at_s is None:
            return
        async with self._renewal:
            if self._lost_at_s is None:
                return
            if time.monotonic() - self._lost_at_s < SETTLE_S:
                raise StoreLost("the job database was lost; it is looked for in a moment")
            # If it fails: not before so long again.
            self._lost_at_s = time.monotonic()
            await self._dispose()
            await self.create()
            self.num_renewals += 1
            logger.warning("jobs are kept again, in the database that is there now")

    def _has_moved(self, identity: FileIdentity | None) -> bool:
        """Say whether another file is there, or none."""
        if self._file is None:
            return False
        found = self._file.identity()
        if found == identity:
            return False
        if found != self._identity:
            self._lose(f"{self._file.path} was {'replaced' if found else 'deleted'}")
        return True

    def _lose(self, reason: str) -> None:
        if self._lost_at_s is None:
            self._lost_at_s = time.monotonic()
            logger.error("the job database is lost, and the jobs in it: %s", reason)

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
        only_reads = statement.is_select and turn is None
        async with self.connect(only_reads=only_reads) as connection:
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
        await self._dispose()

    async def _dispose(self) -> None:
        await self._engine.dispose()
        await self._reading_engine.dispose()


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


def has_lost_tables(error: DatabaseError) -> bool:
    """Say whether the database is not what it was: no tables, older ones, or no database at all."""
    if isinstance(error, ProgrammingError):
        return getattr(error.orig, "sqlstate", None) in MISSING_STATES
    if isinstance(error, OperationalError):
        return any(words in str(error.orig) for words in MISSING_WORDS)
    # SQLite's own word for a file that is none of its files, or half of one.
    return type(error) is DatabaseError


def engine_for(url: URL, *, only_reads: bool = False) -> AsyncEngine:
    """Statements are transactions, but for turns: no caller leaves one open or upgrades its lock.

    A connection that the server ended is replaced before it is used. Errors are logged, and are not
    to tell what a statement holds.
    """
    create = partial(create_async_engine, url, isolation_level="AUTOCOMMIT", hide_parameters=True)
    if url.drivername != DRIVERS["sqlite"]:
        return create(pool_pre_ping=True)
    engine = create(connect_args={"timeout": BUSY_TIMEOUT_S})
    set_up = only_read_sqlite if only_reads else set_up_sqlite
    event.listen(engine.sync_engine, "connect", set_up)
    return engine


def set_up_sqlite(connection: Any, record: object) -> None:
    """What is committed is on the disk: the default may be built otherwise."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def only_read_sqlite(connection: Any, record: object) -> None:
    """A statement that writes is a mistake here: it would wait for other writers."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()


NUM_BYTES = 32


async def shared_secret(database: Database, name: str) -> bytes:
    """Random bytes, for everybody the same ones under that name. Raises StoreLost."""
    query = select(SECRETS.c.value).where(SECRETS.c.name == name)
    # First: who only reads does not wait for who writes.
    if row := await database.first(query):
        return bytes.fromhex(row["value"])
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    made = insert(SECRETS).values(name=name, value=secrets.token_hex(NUM_BYTES))
    await database.execute(made.on_conflict_do_nothing().returning(SECRETS.c.name))
    # Of several who were first at once, one was.
    [row] = await database.execute(query)
    return bytes.fromhex(row["value"])
