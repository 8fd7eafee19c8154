"""The tables of jobs and of shared secrets, the same in SQLite and in PostgreSQL."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect

METADATA = MetaData()


class Unsigned64(TypeDecorator[int]):
    """Up to 2**64 - 1, which databases do not have: the upper half is kept as negative."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """For the database."""
        return value if value is None or value < 2**63 else value - 2**64

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        """From it."""
        return value if value is None or value >= 0 else value + 2**64


JOBS = Table(
    "flux_jobs",
    METADATA,
    Column("job_id", String(36), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("tier", String(128), nullable=False),
    Column("packed", JSON, nullable=False),
    Column("seed", Unsigned64, nullable=False),
    Column("memo", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Double, nullable=False, default=0.0),
    Column("attempt", Integer, nullable=False, default=0),
    Column("num_lost", Integer, nullable=False, default=0),
    Column("worker", String(128)),
    # Of a pending job: not before. Of a running one: the lease's end. Else null: only what has
    # work left is in the index.
    Column("claimable_at_s", Double),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(128)),
    Column("created_at_s", Double, nullable=False),
    Column("started_at_s", Double),
    Column("finished_at_s", Double),
    Column("expires_at_s", Double),
    Column("result", JSON(none_as_null=True)),
    Column("failure", JSON(none_as_null=True)),
    Column("webhook_url", Text),
    Column("webhook_secret", Text),
    # `waiting` for the job's end, `due`, `delivered`, `given up`; null: nobody wants to hear.
    Column("webhook_state", String(16)),
    Column("webhook_attempt", Integer, nullable=False, default=0),
    Column("webhook_num_failed", Integer, nullable=False, default=0),
    # Not before; while it is posted, the lease's end. Null unless it is due.
    Column("webhook_due_at_s", Double),
    # Gateways of an earlier release leave out what follows.
    # The caller's own words about it.
    Column("metadata", JSON(none_as_null=True)),
    # Where it stands in the queue of its tier, while its worker waits for a replica.
    Column("standing", JSON(none_as_null=True)),
    UniqueConstraint("owner", "idempotency_key"),
)

for name in ("claimable_at_s", "expires_at_s", "webhook_due_at_s"):
    column = JOBS.c[name]
    is_set = column.is_not(None)
    Index(f"flux_jobs_{name}", column, sqlite_where=is_set, postgresql_where=is_set)

# For a page of an owner's jobs, newest first.
Index("flux_jobs_listed", JOBS.c.owner, JOBS.c.created_at_s, JOBS.c.job_id)

# What all gateways sign with, as hexadecimal digits.
SECRETS = Table(
    "flux_secrets",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)
