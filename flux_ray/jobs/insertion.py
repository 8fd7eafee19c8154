"""The statement that takes a job in, for an owner who may have so many at once."""

import uuid
from typing import Any

from sqlalchemy import ScalarSelect, UpdateBase, func, select, true
from sqlalchemy.dialects import postgresql, sqlite

from flux_ray.jobs.database import Database
from flux_ray.jobs.job import JobSubmission
from flux_ray.jobs.rows import COLUMNS, bound
from flux_ray.jobs.table import JOBS

# What did not come in whole by then was left by a gateway that ended.
ARRIVAL_S = 3600.0


def insertion(
    database: Database, offer: JobSubmission, packed: dict[str, Any], is_whole: bool, protocol: int
) -> UpdateBase:
    """Insert a job, unless its idempotency key is taken or its owner has as many as it may."""
    now = database.now
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    values = {
        "job_id": str(uuid.uuid4()),
        "owner": offer.owner,
        "tier": offer.request.tier,
        "packed": packed,
        "seed": offer.request.seed,
        "memo": offer.memo,
        "metadata": dict(offer.metadata),
        "created_at_s": now,
        "protocol": protocol,
    }
    if is_whole:
        values |= {"status": "pending", "claimable_at_s": now, "put_off_s": 0.0}
    else:
        values |= {"status": "arriving", "expires_at_s": now + ARRIVAL_S}
    if (idempotency := offer.idempotency) is not None:
        values["idempotency_key"] = idempotency.key
        values["fingerprint"] = idempotency.fingerprint
    if (webhook := offer.webhook) is not None:
        values["webhook_url"] = webhook.url
        values["webhook_secret"] = webhook.secret
        values["webhook_state"] = "waiting"
    row = select(*(bound(value, JOBS.c[name]) for name, value in values.items()))
    if offer.max_active is not None:
        row = row.where(num_active(database, offer.owner) < offer.max_active)
    inserted = insert(JOBS).from_select(list(values), row.where(true()))
    return inserted.on_conflict_do_nothing().returning(*COLUMNS)


def num_active(database: Database, owner: str) -> ScalarSelect[int]:
    """Count the owner's jobs that have not ended, those that are still coming in too."""
    mates = JOBS.alias()
    is_active = mates.c.status.in_(("arriving", "pending", "running"))
    is_kept = func.coalesce(mates.c.expires_at_s > database.now, True)
    query = select(func.count()).select_from(mates)
    return query.where(mates.c.owner == owner, is_active, is_kept).scalar_subquery()
