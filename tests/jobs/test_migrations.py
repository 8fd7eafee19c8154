"""The tables of every release become those of this one, and nothing in them is lost."""

import asyncio
import json

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from flux_ray.jobs.database import Database, shared_secret
from flux_ray.jobs.job import Idempotency
from flux_ray.jobs.migrations.schema import VERSION_TABLE
from flux_ray.jobs.serialization import pack, unpack
from flux_ray.jobs.store import Store
from flux_ray.jobs.table import METADATA
from tests.jobs.conftest import KEEP_S, LEASE_S
from tests.jobs.first_schema import first_insertion, first_schema


@pytest.fixture
async def old_database(database_url, clock):
    """As the first release made it; nobody has migrated it yet."""
    database = Database(database_url, clock)
    await run(database, *first_schema(database.is_sqlite))
    yield database
    await database.close()


async def run(database, *statements):
    async with database.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def differences(database):
    def compare(connection):
        options = {"version_table": VERSION_TABLE}
        return compare_metadata(MigrationContext.configure(connection, opts=options), METADATA)

    async with database.connect() as connection:
        return await connection.run_sync(compare)


async def version_of(database):
    async with database.connect() as connection:
        return (await connection.execute(text(f"SELECT * FROM {VERSION_TABLE}"))).scalars().all()


async def test_the_migrations_end_at_the_tables_of_the_code(database):
    assert await differences(database) == []


async def test_a_column_without_a_migration_is_noticed(database):
    await run(database, "ALTER TABLE flux_jobs DROP COLUMN protocol")
    assert [change[0] for change in await differences(database)] == ["add_column"]


async def test_an_old_database_becomes_as_a_new_one(old_database):
    assert await differences(old_database) != []
    await old_database.create()
    assert await differences(old_database) == []


async def test_jobs_of_an_old_database_are_done(old_database, offer, clock):
    packed = json.dumps(pack(offer().request).row)
    clock.now_s = 1000.0
    await run(
        old_database,
        first_insertion(packed, "pending", 900.0),
        first_insertion(packed, "arriving", 950.0),
        "INSERT INTO flux_secrets VALUES ('result-urls', 'c0ffee')",
    )
    await old_database.create()
    store = Store(old_database, LEASE_S, KEEP_S)
    [job] = await store.list("anna", limit=9)
    assert (job.metadata, job.standing, job.status) == ({}, None, "pending")
    lease = await store.claim("w")
    assert lease.job_id == job.job_id
    assert unpack(lease.job.packed, (), "r") == offer().request
    assert await shared_secret(old_database, "result-urls") == bytes.fromhex("c0ffee")


async def test_a_gateway_of_the_release_before_works_on(old_database, offer, clock):
    await old_database.create()
    store = Store(old_database, LEASE_S, KEEP_S)
    packed = json.dumps(pack(offer().request).row)
    # Its statements name no column that it does not know.
    await run(old_database, first_insertion(packed, "pending", 999.0))
    assert (await store.claim("w")).job.attempt == 1


async def test_gateways_that_start_at_once_migrate_once(old_database, database_url):
    databases = [Database(database_url) for _ in range(5)]
    await asyncio.gather(*(database.create() for database in databases))
    assert await version_of(old_database) == await version_of(databases[0])
    assert len(await version_of(old_database)) == 1
    assert await differences(old_database) == []
    await asyncio.gather(*(database.close() for database in databases))


async def test_a_start_changes_nothing_twice(database, store, offer):
    named = offer(idempotency=Idempotency("key", "words"))
    job = await store.accept(named, pack(named.request).row, is_whole=True)
    await database.create()
    assert await store.find("anna", job.job_id) == job


async def test_a_database_of_a_newer_release_is_left_as_it_is(database, store, offer, serve_log):
    await run(
        database,
        "ALTER TABLE flux_jobs ADD COLUMN mood VARCHAR(8)",
        f"UPDATE {VERSION_TABLE} SET version_num = 'tomorrow'",
    )
    await database.create()
    assert "a newer release made the job database: tomorrow" in serve_log.text
    assert await version_of(database) == ["tomorrow"]
    job = await store.accept(offer(), pack(offer().request).row, is_whole=True)
    assert (await store.claim("w")).job_id == job.job_id


async def test_a_migration_that_fails_leaves_all_as_it_was(old_database, monkeypatch):
    # Its index is there already, so that the second change fails after its columns came.
    await run(old_database, "CREATE INDEX flux_jobs_listed ON flux_jobs (owner)")
    with pytest.raises(Exception, match="flux_jobs_listed"):
        await old_database.create()
    async with old_database.connect() as connection:
        columns = (await connection.execute(text("SELECT * FROM flux_jobs"))).keys()
    assert "protocol" not in list(columns)
    await run(old_database, "DROP INDEX flux_jobs_listed")
    await old_database.create()
    assert await differences(old_database) == []
