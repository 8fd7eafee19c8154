"""The answers of BFL's API: their pydantic models, made from jobs, and the body of a webhook.

The models are the schemas of `/openapi.json`; their docstrings are the descriptions in it.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from flux_ray.gateway.jobs import UPSAMPLING_S
from flux_ray.jobs.job import Job
from flux_ray.jobs.job import Status as JobStatus

Status = Literal["Pending", "Ready", "Request Moderated", "Error", "Task not found"]
# BFL's words and no others: some clients take any other for a schema error.
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
    """A job that was accepted.

    `cost` is its price in GPU seconds. `input_mp` and `output_mp` are the megapixels of the
    references and of the image.
    """

    id: str
    polling_url: str
    status: Status
    webhook_url: str | None = None
    cost: float
    input_mp: float
    output_mp: float
    details: dict[str, Any] = Field(description="the tier that serves it, and warnings")


class Sample(BaseModel):
    """The image of a job that is ready; the URL in `sample` works until the job expires."""

    sample: str
    prompt: str
    seed: int
    start_time: float
    end_time: float
    duration: float


class PreviewSample(BaseModel):
    """A preview of a running job; the URL in `sample` works until the job ends."""

    sample: str


class ResultResponse(BaseModel):
    """The state of a job; `progress` goes from 0 to 1.

    While the job waits, `details` has its `position`, 0 being next, and `expected_s`, the seconds
    until it is done, if known. If it has a webhook, `details` says whether that was delivered.
    """

    id: str
    status: Status
    result: Sample | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: PreviewSample | None = None


class ListedJob(ResultResponse):
    """A job in a list; `state` tells apart what BFL's `status` does not."""

    state: JobStatus
    created_at: float
    metadata: dict[str, str]


class JobList(BaseModel):
    """A page of a key's jobs, newest first; pass `before` for the next page, None on the last."""

    jobs: list[ListedJob]
    before: str | None


class Credits(BaseModel):
    """The GPU seconds that the key has left today; a very large number if it has no limit."""

    credits: float


class Finetunes(BaseModel):
    """The list of finetunes, which is always empty here."""

    finetunes: list[str]


def accepted(job: Job, polling_url: str, webhook_url: str | None) -> AsyncResponse:
    """Return the answer to the request that submitted the job."""
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
    """Return the answer to a poll for the job.

    `sample_url` is given if the job is ready, `preview_url` if it runs and has a preview.
    `num_before` is how many jobs are claimed before it, or None unless it is pending.
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
    """Return the job as an entry of a list."""
    result = result_of(job, sample_url, preview_url)
    return ListedJob(
        **dict(result), state=job.status, created_at=job.created_at_s, metadata=job.metadata
    )


def standing_of(job: Job, num_before: int | None) -> dict[str, Any]:
    """Return the details of a job that waits, to be claimed or in the queue of its tier."""
    if job.status == "running" and job.standing is not None:
        return {"position": job.standing.position, "expected_s": job.standing.expected_s}
    if num_before is None:
        return {}
    return {"position": num_before, "expected_s": None}


def webhook_of(job: Job) -> dict[str, Any]:
    """Return the details of the job's webhook: its state, and how many tries failed."""
    if job.webhook_state is None:
        return {}
    return {"webhook": {"status": job.webhook_state, "num_failed": job.webhook_num_failed}}


def sample_of(job: Job, url: str) -> Sample:
    """Return the image of a job that is ready, at that URL."""
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
    """Return the details: the tier, warnings, the caller's metadata, and the error, if any."""
    generated = () if job.result is None else job.result.warnings
    details: dict[str, Any] = {
        "served_model": job.tier,
        "warnings": [*job.memo["warnings"], *generated],
    }
    if (seconds := job.memo.get(UPSAMPLING_S)) is not None:
        details[UPSAMPLING_S] = seconds
    if job.metadata:
        details["metadata"] = job.metadata
    if job.status == "cancelled":
        details["error"] = {"code": "cancelled", "message": "the job was cancelled"}
    if job.failure is not None:
        details["error"] = {"code": job.failure.code, "message": job.failure.message}
    return details


def message_for(job: Job, sample_url: str | None) -> bytes:
    """Return the JSON body for the job's webhook; `sample_url` is given if the job is ready."""
    details = details_of(job)
    message: dict[str, Any] = {"id": job.job_id, "status": STATUSES[job.status]}
    if sample_url is not None:
        message["result"] = sample_of(job, sample_url).model_dump()
    elif (error := details.get("error")) is not None:
        message |= {"error": error["code"], "message": error["message"]}
    # The time of the job's end, not of posting: a repeat has the same body.
    return to_json(message | {"details": details, "timestamp": job.finished_at_s})
