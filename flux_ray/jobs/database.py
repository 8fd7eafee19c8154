"""Access to the job database, SQLite or PostgreSQL: connections, transactions, and its clock.

`Database` also notices when the database is deleted, replaced or restored while it is in use. The
file of an SQLite database is private to its user, and is recognized by its inode. `shared_secret`
keeps the random bytes that all gateways of one database sign with.
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

# Suffixes of the files that SQLite writes: the database and two beside it, which get the mode that
# the database has.
COMPANIONS = ("", "-wal", "-shm")


class FileIdentity(NamedTuple):
    """The device and inode of a file: they stay the same while its contents change."""

    device: int
    inode: int


class DatabaseFile:
    """The file of an SQLite database.

    Only `make` creates it. Connections open it with `mode=rw`: otherwise SQLite would put an empty
    database in the place of one that was deleted, and nobody would notice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Create the file if it is missing, and make it private if it is not. Raises OSError."""
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
        """Return the identity of the file that is at the path now, or None if there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return FileIdentity(found.st_dev, found.st_ino)

    def url_for(self, url: URL) -> URL:
        """Return `url` changed so that connecting fails if the file is missing."""
        name = f"file:{quote(str(self.path.absolute()))}"
        return url.set(database=name, query={"mode": "rw", "uri": "true"})


DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
# How long a statement waits for a lock that another process holds.
BUSY_TIMEOUT_S = 30
SWITCH_TRIES = 10
SWITCH_PAUSE_S = 0.1
# A lost database is not touched for so long: whoever restores its tables may still be at it, and
# tables made in between would collide with theirs.
SETTLE_S = 3.0
# SQLite's messages and PostgreSQL's SQLSTATEs for tables or columns that are missing.
MISSING_WORDS = ("no such table", "no such column", "has no column named")
MISSING_STATES = ("42P01", "42703", "3F000")
# SQLite counts days from 4714 BC; this is 1970-01-01 in its count.
JULIAN_DAY_OF_1970 = 2440587.5
DAY_S = 86400.0
# The timeouts end a transaction whose gateway was cut off: it would hold the lock, and so keep all
# other statements of its `turn` waiting for ever.
BEGIN_TURN = (
    f"BEGIN; SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s';"
    f" SET LOCAL idle_in_transaction_session_timeout = '{BUSY_TIMEOUT_S}s'"
)
# The advisory lock under which gateways that start at once migrate one after another.
CREATION_LOCK = 7_355_608

# Below this level it logs the values of each statement, prompts among them.
logging.getLogger("aiosqlite").setLevel(logging.WARNING)

Clock = Callable[[], float]


class Database:
    """The connections of one process to the job database.

    The database's own clock decides when rows expire and when pauses end, as it is the same for
    all gateways. Somebody may set it back or forward: job leases do not depend on it, and pauses
    do not become longer. Tests pass a `clock` in its place.

    If the database is deleted, replaced or restored while in use, it is lost: all calls raise
    StoreLost for `SETTLE_S`, then the tables are made or migrated again. `num_renewals` counts how
    often that happened, so that values cached from an earlier database can be dropped.
    """

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self._url = url_for(url)
        self._file: DatabaseFile | None = None
        if self._url.drivername == DRIVERS["sqlite"] and self._url.database:
            self._file = DatabaseFile(Path(self._url.database))
            self._url = self._file.url_for(self._url)
        self._clock = clock
        self._engine = engine_for(self._url)
        # Separate connections: when all others wait for a writer's lock, polls by clients still
        # find a free one.
        self._reading_engine = engine_for(self._url, only_reads=True)
        self._statements: set[asyncio.Task[Sequence[RowMapping]]] = set()
        self._identity: FileIdentity | None = None
        self._lost_at_s: float | None = None
        self._renewal = asyncio.Lock()
        self.num_renewals = 0

    @property
    def now(self) -> ColumnElement[float]:
        """Return the SQL expression for the time of its statement, in seconds since 1970."""
        if self._clock is not None:
            return literal(self._clock(), Double)
        if self.is_sqlite:
            return (func.julianday("now", type_=Double) - JULIAN_DAY_OF_1970) * DAY_S
        # Not `clock_timestamp`, which changes from row to row: no index could be used.
        return cast(extract("epoch", func.statement_timestamp()), Double)

    @property
    def is_sqlite(self) -> bool:
        """Return whether this is an SQLite file, not a PostgreSQL server."""
        return self._engine.dialect.name == "sqlite"

    async def create(self) -> None:
        """Create the tables, or migrate them to this release. Raises StoreLost."""
        for _ in range(SWITCH_TRIES if self.is_sqlite else 0):
            try:
                return await self._create()
            except StoreLost:
                # Processes that switch a new file to WAL at once do not wait for each other: SQLite
                # fails at once, whatever the busy timeout.
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
        """Create the SQLite file if it is missing, and remember its identity. Raises StoreLost."""
        if self._file is None:
            return
        try:
            await asyncio.to_thread(self._file.make)
        except OSError as error:
            raise StoreLost(str(error)) from error
        self._identity = self._file.identity()

    @asynccontextmanager
    async def connect(self, *, only_reads: bool = False) -> AsyncIterator[AsyncConnection]:
        """Open a connection that commits after every statement. Raises StoreLost."""
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
                # What was written went into a file that has no name any more.
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
        """Check that the database is still the one that was opened; renew it after `SETTLE_S`.

        Raises StoreLost while it is lost.
        """
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
            # Set before trying: if it fails, the next try is `SETTLE_S` later.
            self._lost_at_s = time.monotonic()
            await self._dispose()
            await self.create()
            self.num_renewals += 1
            logger.warning("jobs are kept again, in the database that is there now")

    def _has_moved(self, identity: FileIdentity | None) -> bool:
        """Return whether another SQLite file is at the path now, or none."""
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
        """Execute a statement and return its rows. Raises StoreLost.

        Statements with the same `turn` run one after another, so that each sees the effect of
        those before it.

        If the caller is cancelled the statement still runs to its end: cut off in the middle, it
        would leave a connection and its thread behind.
        """
        task = asyncio.create_task(self._execute(statement, turn))
        self._statements.add(task)
        task.add_done_callback(self._statements.discard)
        task.add_done_callback(look_at)
        return await asyncio.shield(task)

    async def first(self, statement: Executable, turn: str | None = None) -> RowMapping | None:
        """Execute a statement and return its first row, or None; `turn` as for execute."""
        rows = await self.execute(statement, turn)
        return rows[0] if rows else None

    async def _execute(self, statement: Executable, turn: str | None) -> Sequence[RowMapping]:
        only_reads = statement.is_select and turn is None
        async with self.connect(only_reads=only_reads) as connection:
            # SQLite has only one writer at a time: it needs no lock for turns.
            if turn is None or self.is_sqlite:
                return (await connection.execute(statement)).mappings().all()
            await connection.exec_driver_sql(BEGIN_TURN)
            await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(turn))))
            rows = (await connection.execute(statement)).mappings().all()
            await connection.exec_driver_sql("COMMIT")
            return rows

    async def close(self) -> None:
        """Wait for the running statements, then close all connections."""
        if self._statements:
            await asyncio.wait(tuple(self._statements))
        await self._dispose()

    async def _dispose(self) -> None:
        await self._engine.dispose()
        await self._reading_engine.dispose()


def look_at(task: "asyncio.Task[Any]") -> None:
    """Retrieve the error of a statement whose caller is gone, or asyncio would log it."""
    if not task.cancelled():
        task.exception()


def url_for(url: str) -> URL:
    """Return a `sqlite:///...` or `postgresql://...` URL with the driver of this package."""
    parsed = make_url(url)
    if parsed.drivername not in DRIVERS:
        raise ValueError(f"database: {parsed.drivername} is neither sqlite nor postgresql")
    parsed = parsed.set(drivername=DRIVERS[parsed.drivername])
    if parsed.drivername == DRIVERS["sqlite"] and parsed.database:
        return parsed.set(database=str(Path(parsed.database).expanduser()))
    return parsed


def has_lost_tables(error: DatabaseError) -> bool:
    """Return whether the error means that tables are missing or older, or the file is none."""
    if isinstance(error, ProgrammingError):
        return getattr(error.orig, "sqlstate", None) in MISSING_STATES
    if isinstance(error, OperationalError):
        return any(words in str(error.orig) for words in MISSING_WORDS)
    # SQLite raises the base class itself for a file that is not a database, or half of one.
    return type(error) is DatabaseError


def engine_for(url: URL, *, only_reads: bool = False) -> AsyncEngine:
    """Return an engine whose connections commit after every statement.

    So no caller leaves a transaction open or upgrades a read lock; only turns use longer ones. A
    connection that the server has closed is replaced before use. Parameters are hidden from error
    texts, which are logged: they hold prompts and secrets.
    """
    create = partial(create_async_engine, url, isolation_level="AUTOCOMMIT", hide_parameters=True)
    if url.drivername != DRIVERS["sqlite"]:
        return create(pool_pre_ping=True)
    engine = create(connect_args={"timeout": BUSY_TIMEOUT_S})
    set_up = only_read_sqlite if only_reads else set_up_sqlite
    event.listen(engine.sync_engine, "connect", set_up)
    return engine


def set_up_sqlite(connection: Any, record: object) -> None:
    """Have every commit synced to the disk; SQLite may be built with a weaker default."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def only_read_sqlite(connection: Any, record: object) -> None:
    """Let statements that write fail: on this connection they would wait for other writers."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()


NUM_BYTES = 32


async def shared_secret(database: Database, name: str) -> bytes:
    """Return the secret of that name, the same for all gateways; make it if it is missing.

    Raises StoreLost.
    """
    query = select(SECRETS.c.value).where(SECRETS.c.name == name)
    # A read comes first, as it does not wait for writers.
    if row := await database.first(query):
        return bytes.fromhex(row["value"])
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    made = insert(SECRETS).values(name=name, value=secrets.token_hex(NUM_BYTES))
    await database.execute(made.on_conflict_do_nothing().returning(SECRETS.c.name))
    # If several gateways inserted it at once, one of them won: all take that one.
    [row] = await database.execute(query)
    return bytes.fromhex(row["value"])
