"""A database that is deleted, replaced or emptied under a running gateway, and one that is busy."""

import asyncio
import logging
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from flux_ray.config.gateway import JobArgs
from flux_ray.errors import StoreLost
from flux_ray.jobs import database as module
from flux_ray.jobs.database import Database, shared_secret
from flux_ray.jobs.images import Results
from flux_ray.jobs.service import JobService
from flux_ray.jobs.service import accept as accept_into
from flux_ray.jobs.store import Store
from tests.jobs.conftest import KEEP_S, LEASE_S
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until

# Much longer than a statement takes.
LOCKED_S = 4.0


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "SETTLE_S", 0.2)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "rows" / "jobs.sqlite3"


@pytest.fixture
async def file_database(path):
    database = Database(f"sqlite:///{path}")
    await database.create()
    yield database
    await database.close()


@pytest.fixture
def file_store(file_database) -> Store:
    return Store(file_database, LEASE_S, KEEP_S)


def with_companions(path: Path) -> list[Path]:
    return [each for end in ("", "-wal", "-shm") if (each := Path(f"{path}{end}")).exists()]


def delete(path: Path) -> None:
    for each in with_companions(path):
        each.unlink()


def replace_by_an_empty_one(path: Path) -> None:
    delete(path)
    path.touch()


def replace_by_another(path: Path) -> None:
    """As the start of another release does."""
    delete(path)
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (word TEXT)")
    other.close()


def replace_by_no_database(path: Path) -> None:
    delete(path)
    path.write_bytes(b"no database" * 1000)


async def submit(store: Store, offer) -> str | None:
    """The id of a job that was accepted; None if the store said that it was not."""
    try:
        return (await store.accept(offer, {"prompt": "x"}, is_whole=True)).job_id
    except StoreLost:
        return None


async def found(store: Store, job_id: str) -> bool:
    return await store.find("anna", job_id) is not None


async def is_back(store: Store, offer) -> bool:
    return await submit(store, offer) is not None


@pytest.mark.parametrize("lose", [delete, replace_by_an_empty_one, replace_by_another])
async def test_no_job_is_accepted_into_a_file_that_was_lost(
    lose: Callable[[Path], None], path, file_store, offer, serve_log
):
    assert await submit(file_store, offer())
    submits = [asyncio.create_task(submit(file_store, offer(n))) for n in range(30)]
    await asyncio.sleep(0.01)
    lose(path)
    submits += [asyncio.create_task(submit(file_store, offer(n))) for n in range(30, 60)]
    accepted = await asyncio.gather(*submits)
    assert None in accepted, "the store says that it is lost"
    await wait_until(lambda: is_back(file_store, offer(99)))
    # As another gateway finds it, and the next start of this one. What was kept before the loss is
    # gone with the file.
    late = [job_id for job_id in accepted[30:] if job_id is not None]
    other = Database(f"sqlite:///{path}")
    assert all([await found(Store(other, LEASE_S, KEEP_S), job_id) for job_id in late])
    await other.close()
    errors = [each for each in serve_log.records if each.levelno == logging.ERROR]
    assert len(errors) == 1, "once, not with every request"
    assert "the job database is lost" in errors[0].getMessage()


async def test_what_was_written_into_a_file_while_it_was_deleted_is_no_accepted_job(
    path, file_store, offer
):
    """A writer that waits for a lock writes into the old file, however long ago that was lost."""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    submits = [asyncio.create_task(submit(file_store, offer(n))) for n in range(5)]
    await asyncio.sleep(0.2)
    delete(path)
    await wait_until(lambda: is_back(file_store, offer(99)))
    assert not any(each.done() for each in submits)
    holder.execute("COMMIT")
    holder.close()
    assert await asyncio.gather(*submits) == [None] * 5


async def test_a_backup_that_is_put_in_its_place_is_read(path, file_store, file_database, offer):
    job_id = await submit(file_store, offer())
    secret = await shared_secret(file_database, "result-urls")
    async with file_database.connect() as connection:
        await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    backup = path.with_name("backup")
    shutil.copy(path, backup)
    later = await submit(file_store, offer())
    delete(path)
    with pytest.raises(StoreLost):
        await found(file_store, job_id)
    backup.replace(path)

    async def is_there() -> bool:
        try:
            return await found(file_store, job_id)
        except StoreLost:
            return False

    await wait_until(is_there)
    assert not await found(file_store, later)
    assert await shared_secret(file_database, "result-urls") == secret
    assert file_database.num_renewals == 1


async def test_a_file_that_is_no_database_is_a_lost_store_until_it_is_gone(path, file_store, offer):
    replace_by_no_database(path)
    for _ in range(3):
        assert await submit(file_store, offer()) is None
        await asyncio.sleep(0.1)
    assert path.read_bytes().startswith(b"no database"), "it is not ours to mend"
    delete(path)
    await wait_until(lambda: is_back(file_store, offer()))


@pytest.mark.parametrize("tables", [("flux_jobs",), ("flux_jobs", "flux_alembic_version")])
async def test_tables_that_were_dropped_are_made_anew(tables, database_url, offer, serve_log):
    database = Database(database_url)
    await database.create()
    store = Store(database, LEASE_S, KEEP_S)
    for _ in range(8):
        assert await submit(store, offer())
    for table in tables:
        if database.is_sqlite:
            async with database.connect() as connection:
                await connection.exec_driver_sql(f"DROP TABLE {table}")
        else:
            with psycopg.connect(database_url, autocommit=True) as connection:
                connection.execute(f"DROP TABLE {table}")
    assert await asyncio.gather(*(submit(store, offer()) for _ in range(8))) == [None] * 8
    await wait_until(lambda: is_back(store, offer()))
    assert serve_log.text.count("the job database is lost") == 1
    await database.close()


async def test_a_desk_goes_on_in_the_database_that_is_there(tmp_path, path, offer):
    args = JobArgs(database=f"sqlite:///{path}", results=str(tmp_path / "results"))
    desk = JobService(args, paint)
    await desk.open()
    secret = await desk.url_secret()
    delete(path)

    async def is_ready() -> bool:
        try:
            job = await desk.accept(offer())
            await wait_until(lambda: ready(job.job_id))
        except StoreLost:
            return False
        return True

    async def ready(job_id: str) -> bool:
        return (await desk.find("anna", job_id)).status == "ready"

    await wait_until(is_ready)
    assert await desk.url_secret() != secret, "others read the new one"
    await desk.close()


HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("COMMIT")
"""


async def test_who_reads_never_waits_for_who_writes(tmp_path, path, file_database, offer):
    """Twenty writers wait for another process, more than a pool has connections."""
    store = Store(file_database, LEASE_S, KEEP_S)
    job = await accept_into(store, Results(str(tmp_path / "results")), offer())
    secret = await shared_secret(file_database, "result-urls")
    command = [sys.executable, "-c", HOLD, str(path), str(LOCKED_S)]
    holder = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert await holder.stdout.readline() == b"locked\n"
    submits = [asyncio.create_task(submit(store, offer(n))) for n in range(20)]
    times = []
    while holder.returncode is None:
        began = time.monotonic()
        assert await store.find("anna", job.job_id) is not None
        assert await store.position_of(job.job_id) is not None
        assert len(await store.list("anna", limit=5)) >= 1
        assert await shared_secret(file_database, "result-urls") == secret
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    assert None not in await asyncio.gather(*submits)
    assert len(times) > 1 and max(times) < LOCKED_S / 2, "they waited for the lock"
