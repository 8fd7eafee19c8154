"""The tables of jobs and of shared secrets, the same in SQLite and in PostgreSQL.

A change here needs a file in `migrations/versions`: a test compares the two.
"""

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
    """An integer up to 2**64 - 1; databases have none, so the upper half is stored as negative."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Return the signed integer that the database stores."""
        return value if value is None or value < 2**63 else value - 2**64

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        """Return the unsigned integer that was stored."""
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
    # The time before which a pending job is not claimed, or the end of a running job's lease. Null
    # for all others, which keeps the index as small as the work that is left.
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
    # `waiting` for the job's end, `due`, `delivered` or `given up`; null without a webhook.
    Column("webhook_state", String(16)),
    Column("webhook_attempt", Integer, nullable=False, default=0),
    Column("webhook_num_failed", Integer, nullable=False, default=0),
    # The time before which it is not posted; while it is posted, the lease's end. Null unless due.
    Column("webhook_due_at_s", Double),
    # All columns below are null in rows that gateways of an earlier release wrote.
    # The caller's own key-value pairs, which come back with the job.
    Column("metadata", JSON(none_as_null=True)),
    # Its place in the queue of its tier, while its worker waits for a replica.
    Column("standing", JSON(none_as_null=True)),
    # PROTOCOL of the release that packed the request: earlier releases leave the job to others.
    Column("protocol", Integer),
    # Counts heartbeats: by its changes other gateways see that the worker is alive.
    Column("beat", Integer),
    # The whole pause before `claimable_at_s`: if more is left, the clock was set back meanwhile.
    Column("put_off_s", Double),
    Column("webhook_put_off_s", Double),
    UniqueConstraint("owner", "idempotency_key"),
)

for name in ("claimable_at_s", "expires_at_s", "webhook_due_at_s"):
    column = JOBS.c[name]
    is_set = column.is_not(None)
    Index(f"flux_jobs_{name}", column, sqlite_where=is_set, postgresql_where=is_set)

is_set = JOBS.c.claimable_at_s.is_not(None)
Index(
    "flux_jobs_by_tier",
    JOBS.c.tier,
    JOBS.c.claimable_at_s,
    sqlite_where=is_set,
    postgresql_where=is_set,
)
# For a page of an owner's jobs, newest first.
Index("flux_jobs_listed", JOBS.c.owner, JOBS.c.created_at_s, JOBS.c.job_id)

# The secrets that all gateways sign with, as hexadecimal digits.
SECRETS = Table(
    "flux_secrets",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)
