"""The second migration: columns for lists of jobs, protocol numbers, and heartbeats."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns, which gateways of the release before leave null, and two indexes."""
    for column in (
        sa.Column("metadata", sa.JSON),
        sa.Column("standing", sa.JSON),
        sa.Column("protocol", sa.Integer),
        sa.Column("beat", sa.Integer),
        sa.Column("put_off_s", sa.Double),
        sa.Column("webhook_put_off_s", sa.Double),
    ):
        op.add_column("flux_jobs", column)
    op.create_index("flux_jobs_listed", "flux_jobs", ["owner", "created_at_s", "job_id"])
    is_set = sa.text("claimable_at_s IS NOT NULL")
    op.create_index(
        "flux_jobs_by_tier",
        "flux_jobs",
        ["tier", "claimable_at_s"],
        sqlite_where=is_set,
        postgresql_where=is_set,
    )
