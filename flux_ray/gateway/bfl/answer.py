"""From a job to BFL's answers: what was accepted, and what became of it.

What BFL's API posts to a job's webhook: how it ended, for whoever need not ask then.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from flux_ray.jobs.job import Job
from flux_ray.jobs.job import Status as JobStatus

Status = Literal["Pending", "Ready", "Request Moderated", "Error", "Task not found"]
# Some clients take any other word for a schema error.
STATUSES: dict[JobStatus, Status] = {
    "arriving": "Pending",
    "pending": "Pending",
    "running": "Pending",
    "ready": "Ready",
    "failed": "Error",
    "refused": "Request Moderated",
    "cancelled": "Error",
}


class AsyncResponse(BaseModel):
    """A job. `cost` is in GPU seconds, by the price; megapixels are those read and drawn."""

    id: str
    polling_url: str
    status: Status
    webhook_url: str | None = None
    cost: float
    input_mp: float
    output_mp: float
    details: dict[str, Any] = Field(description="the tier that serves it, and warnings")


class Sample(BaseModel):
    """The image of a job that is ready: `sample` is where, until that expires."""

    sample: str
    prompt: str
    seed: int
    start_time: float
    end_time: float
    duration: float


class PreviewSample(BaseModel):
    """What a job will look like: `sample` is where, until the job ends."""

    sample: str


class ResultResponse(BaseModel):
    """What is known of a job; `progress` goes from 0 to 1.

    Of one that waits, `details` has its `position`, 0 being next, and where it is known
    `expected_s`, the seconds until it is done; of one with a webhook what became of that.
    """

    id: str
    status: Status
    result: Sample | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: PreviewSample | None = None


class ListedJob(ResultResponse):
    """A job in a list; `state` says more than BFL's `status` does."""

    state: JobStatus
    created_at: float
    metadata: dict[str, str]


class JobList(BaseModel):
    """A page of a key's jobs, newest first; `before` is for the next page, None on the last."""

    jobs: list[ListedJob]
    before: str | None


class Credits(BaseModel):
    """GPU seconds that are left to the key today; very many where its class has no limit."""

    credits: float


class Finetunes(BaseModel):
    """There are none here."""

    finetunes: list[str]


def accepted(job: Job, polling_url: str, webhook_url: str | None) -> AsyncResponse:
    """The answer to who hands a job in."""
    return AsyncResponse(
        id=job.job_id,
        polling_url=polling_url,
        status=STATUSES[job.status],
        webhook_url=webhook_url,
        details=details_of(job),
        **{name: job.memo[name] for name in ("cost", "input_mp", "output_mp")},
    )


def result_of(
    job: Job, sample_url: str | None, preview_url: str | None, num_before: int | None = None
) -> ResultResponse:
    """The answer to who asks for it; `sample_url` where it is ready, and before `preview_url`.

    `num_before`: so many jobs are taken up before it, if it waits for that.
    """
    return ResultResponse(
        id=job.job_id,
        status=STATUSES[job.status],
        result=None if sample_url is None else sample_of(job, sample_url),
        progress=job.progress,
        details=details_of(job) | standing_of(job, num_before) | webhook_of(job),
        preview=None if preview_url is None else PreviewSample(sample=preview_url),
    )


def listed(job: Job, sample_url: str | None, preview_url: str | None) -> ListedJob:
    """Return a job as it stands in a list."""
    result = result_of(job, sample_url, preview_url)
    return ListedJob(
        **dict(result), state=job.status, created_at=job.created_at_s, metadata=job.metadata
    )


def standing_of(job: Job, num_before: int | None) -> dict[str, Any]:
    """Say where a job waits: for a worker to take it up, or in the queue of its tier."""
    if job.status == "running" and job.standing is not None:
        return {"position": job.standing.position, "expected_s": job.standing.expected_s}
    if num_before is None:
        return {}
    return {"position": num_before, "expected_s": None}


def webhook_of(job: Job) -> dict[str, Any]:
    """Say whether its webhook has taken the end, and how often it did not."""
    if job.webhook_state is None:
        return {}
    return {"webhook": {"status": job.webhook_state, "num_failed": job.webhook_num_failed}}


def sample_of(job: Job, url: str) -> Sample:
    """Of a job that is ready."""
    began, ended = job.started_at_s or job.created_at_s, job.finished_at_s or job.created_at_s
    return Sample(
        sample=url,
        prompt=job.packed["prompt"],
        seed=job.seed,
        start_time=began,
        end_time=ended,
        duration=ended - began,
    )


def details_of(job: Job) -> dict[str, Any]:
    """The tier, what was not heeded, the caller's own words, and why there is no image."""
    generated = () if job.result is None else job.result.warnings
    details: dict[str, Any] = {
        "served_model": job.tier,
        "warnings": [*job.memo["warnings"], *generated],
    }
    if job.metadata:
        details["metadata"] = job.metadata
    if job.status == "cancelled":
        details["error"] = {"code": "cancelled", "message": "the job was cancelled"}
    if job.failure is not None:
        details["error"] = {"code": job.failure.code, "message": job.failure.message}
    return details


def message_for(job: Job, sample_url: str | None) -> bytes:
    """The JSON body. `sample_url`: where the image is, of a job that is ready."""
    details = details_of(job)
    message: dict[str, Any] = {"id": job.job_id, "status": STATUSES[job.status]}
    if sample_url is not None:
        message["result"] = sample_of(job, sample_url).model_dump()
    elif (error := details.get("error")) is not None:
        message |= {"error": error["code"], "message": error["message"]}
    # Of the end, not of the posting: a repeat says the same.
    return to_json(message | {"details": details, "timestamp": job.finished_at_s})
