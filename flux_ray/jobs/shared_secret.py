"""Secrets that all gateways of a database share: whoever asks first makes them."""

import secrets

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from flux_ray.jobs.database import Database
from flux_ray.jobs.table import SECRETS

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
