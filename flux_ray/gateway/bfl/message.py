"""What BFL's API posts to a job's webhook: how it ended, for whoever need not ask then."""

from typing import Any

from pydantic_core import to_json

from flux_ray.gateway.bfl.answer import STATUSES, details_of, sample_of
from flux_ray.jobs.job import Job


def message_for(job: Job, sample_url: str | None) -> bytes:
    """The JSON body. `sample_url`: where the picture is, of a job that is ready."""
    details = details_of(job)
    message: dict[str, Any] = {"id": job.job_id, "status": STATUSES[job.status]}
    if sample_url is not None:
        message["result"] = sample_of(job, sample_url).model_dump()
    elif (error := details.get("error")) is not None:
        message |= {"error": error["code"], "message": error["message"]}
    # Of the end, not of the posting: a repeat says the same.
    return to_json(message | {"details": details, "timestamp": job.finished_at_s})
