"""The first migration: the tables of jobs and of shared secrets as they were without migrations."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create both tables with their indexes."""
    op.create_table("flux_jobs", *job_columns(), sa.UniqueConstraint("owner", "idempotency_key"))
    for name in ("claimable_at_s", "expires_at_s", "webhook_due_at_s"):
        is_set = sa.text(f"{name} IS NOT NULL")
        op.create_index(
            f"flux_jobs_{name}", "flux_jobs", [name], sqlite_where=is_set, postgresql_where=is_set
        )
    op.create_table(
        "flux_secrets",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(128), nullable=False),
    )


def job_columns() -> list[sa.Column[Any]]:
    """Return the columns of the table of jobs."""
    return [
        sa.Column("job_id", sa.String(36), primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("tier", sa.String(128), nullable=False),
        sa.Column("packed", sa.JSON, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("memo", sa.JSON, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("num_lost", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("claimable_at_s", sa.Double),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("fingerprint", sa.String(128)),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("started_at_s", sa.Double),
        sa.Column("finished_at_s", sa.Double),
        sa.Column("expires_at_s", sa.Double),
        sa.Column("result", sa.JSON),
        sa.Column("failure", sa.JSON),
        sa.Column("webhook_url", sa.Text),
        sa.Column("webhook_secret", sa.Text),
        sa.Column("webhook_state", sa.String(16)),
        sa.Column("webhook_attempt", sa.Integer, nullable=False),
        sa.Column("webhook_num_failed", sa.Integer, nullable=False),
        sa.Column("webhook_due_at_s", sa.Double),
    ]
