"""The values that describe a job: a caller's submission, the row in the store, a worker's lease."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flux_ray.request import ImageRequest, QueuePosition

# `arriving`: its reference images are still being stored, and no caller knows it yet. `refused`: by
# the content filter. The last four are final.
Status = Literal["arriving", "pending", "running", "ready", "failed", "refused", "cancelled"]
End = Literal["ready", "failed", "refused"]
# The ones that a caller can see.
State = Literal["pending", "running", "ready", "failed", "refused", "cancelled"]


@dataclass(frozen=True)
class Idempotency:
    """The idempotency key of a submission: sent again, it gets the same job.

    `fingerprint` is a hash of the caller's request: the same key with another request is refused.
    """

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Webhook:
    """The URL to which a job's end is posted, and the secret that signs the message.

    Both are left out of the repr, and so out of logs: URLs may contain secrets too.
    """

    url: str = field(repr=False)
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class JobSubmission:
    """A request to be accepted as a job; `owner` is a hash of the caller's key.

    `memo` is JSON that the API dialect stores for its own answers. `max_active` is how many
    unfinished jobs the owner may have, this one included; None for any number. `metadata` is the
    caller's own, and comes back with the job.
    """

    owner: str
    request: ImageRequest
    idempotency: Idempotency | None = None
    webhook: Webhook | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    max_active: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredImage:
    """An image in the results store, with its name there and its checksum."""

    name: str
    seed: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobResult:
    """The outcome of a job that is ready: its images, and the seconds of each stage."""

    images: tuple[StoredImage, ...]
    stages_s: dict[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobFailure:
    """The reason why a job has no image, in words for the caller."""

    code: str
    message: str


class ListPlace(NamedTuple):
    """The position of a job in the list of its owner's jobs, from which the next page starts."""

    created_at_s: float
    job_id: str


@dataclass(frozen=True)
class Job:
    """A job as its row in the store has it; times are the database's, in seconds since 1970.

    `packed` is the request without its images. `attempt` counts the claims, and `num_lost` the
    workers that were lost while they had the job. `progress` goes from 0 to 1. While the job runs,
    `result` has its previews, and `standing` is its place in the queue of its tier, if its worker
    waits there. `webhook_state` is None without a webhook, else `waiting` for the job's end, `due`,
    `delivered` or `given up`.
    """

    job_id: str
    owner: str
    tier: str
    packed: dict[str, Any]
    seed: int
    status: Status
    progress: float
    attempt: int
    num_lost: int
    created_at_s: float
    started_at_s: float | None = None
    finished_at_s: float | None = None
    expires_at_s: float | None = None
    result: JobResult | None = None
    failure: JobFailure | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    standing: QueuePosition | None = None
    webhook_state: str | None = None
    webhook_num_failed: int = 0

    @property
    def place(self) -> ListPlace:
        """Return the job's position in the list of its owner's jobs."""
        return ListPlace(self.created_at_s, self.job_id)

    @property
    def preview(self) -> StoredImage | None:
        """Return the newest preview of a running job, or None."""
        if self.status != "running" or self.result is None:
            return None
        return self.result.images[-1]


@dataclass(frozen=True)
class Lease:
    """A worker's right to a job, which ends as soon as the row has another attempt number."""

    job: Job

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def attempt(self) -> int:
        """Return the attempt number, which no other lease of the job has."""
        return self.job.attempt
