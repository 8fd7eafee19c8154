"""The tables as the first release made them, before there were migrations: never changed."""

import uuid

JOBS = """CREATE TABLE flux_jobs (
    job_id VARCHAR(36) NOT NULL, owner VARCHAR(128) NOT NULL, tier VARCHAR(128) NOT NULL,
    packed JSON NOT NULL, seed BIGINT NOT NULL, memo JSON NOT NULL, status VARCHAR(16) NOT NULL,
    progress {double} NOT NULL, attempt INTEGER NOT NULL, num_lost INTEGER NOT NULL,
    worker VARCHAR(128), claimable_at_s {double}, idempotency_key VARCHAR(255),
    fingerprint VARCHAR(128), created_at_s {double} NOT NULL, started_at_s {double},
    finished_at_s {double}, expires_at_s {double}, result JSON, failure JSON, webhook_url TEXT,
    webhook_secret TEXT, webhook_state VARCHAR(16), webhook_attempt INTEGER NOT NULL,
    webhook_num_failed INTEGER NOT NULL, webhook_due_at_s {double},
    PRIMARY KEY (job_id), UNIQUE (owner, idempotency_key)
)"""
SECRETS = (
    "CREATE TABLE flux_secrets"
    " (name VARCHAR(64) NOT NULL, value VARCHAR(128) NOT NULL, PRIMARY KEY (name))"
)
INDEX = "CREATE INDEX flux_jobs_{name} ON flux_jobs ({name}) WHERE {name} IS NOT NULL"
INDEXED = ("claimable_at_s", "expires_at_s", "webhook_due_at_s")
INSERTION = (
    "INSERT INTO flux_jobs (job_id, owner, tier, packed, seed, memo, status, progress, attempt,"
    " num_lost, worker, claimable_at_s, created_at_s, webhook_attempt, webhook_num_failed)"
    " VALUES ('{job_id}', 'anna', 'tiny', '{packed}', 7, '{{}}', '{status}', 0, {attempt}, 0,"
    " {worker}, {claimable_at_s}, 900, 0, 0)"
)


def first_schema(is_sqlite: bool) -> list[str]:
    """The statements that made it."""
    double = "DOUBLE" if is_sqlite else "DOUBLE PRECISION"
    indexes = [INDEX.format(name=name) for name in INDEXED]
    return [JOBS.format(double=double), *indexes, SECRETS]


def first_insertion(packed: str, status: str, claimable_at_s: float) -> str:
    """The row of a job as that release left it, pending or running."""
    is_running = status == "running"
    return INSERTION.format(
        job_id=uuid.uuid4(),
        packed=packed.replace("'", "''").replace(":", "\\:"),
        status=status,
        attempt=int(is_running),
        worker="'old'" if is_running else "NULL",
        claimable_at_s=claimable_at_s,
    )
