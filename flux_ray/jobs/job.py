"""What is said of jobs: what a caller offers, what the store knows, what a worker holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flux_ray.request import ImageRequest, QueuePosition

# `arriving`: its reference images are being stored, nobody was told of it. `refused`: by the
# content filter. The last four are ends: nothing leaves them.
Status = Literal["arriving", "pending", "running", "ready", "failed", "refused", "cancelled"]
End = Literal["ready", "failed", "refused"]
# Those that a caller may hear of.
State = Literal["pending", "running", "ready", "failed", "refused", "cancelled"]


@dataclass(frozen=True)
class Idempotency:
    """A caller's own name for an offer: the same again is the same job.

    `fingerprint` is of the caller's words: the key with others is refused.
    """

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Webhook:
    """Where the caller wants to hear of the end, and what the message is signed with.

    Neither is printed: URLs have secrets in them too.
    """

    url: str = field(repr=False)
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class JobSubmission:
    """A request to be kept until it is done; `owner` is a hash of the caller's key.

    `memo` is JSON that the dialect wants back when it answers. `max_active`: so many jobs of the
    owner may not have ended, this one included. `metadata` is the caller's own, and given back.
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
    """An image in the results store, by its name there."""

    name: str
    seed: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobResult:
    """What a job came to: its images, and what they took."""

    images: tuple[StoredImage, ...]
    stages_s: dict[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobFailure:
    """Why there is no image, in words for the caller."""

    code: str
    message: str


class ListPlace(NamedTuple):
    """Where a job stands in the list of its owner's jobs: a page may begin after it."""

    created_at_s: float
    job_id: str


@dataclass(frozen=True)
class Job:
    """A row of the store. Times are of the database's clock, in seconds since 1970.

    `packed` is the request without its images. `num_lost` counts the workers that were lost with
    it. `progress` goes from 0 to 1. While it runs, `result` has its previews, and `standing`
    says where it is in its tier's queue, if its worker waits there. `webhook_state` is None without
    a webhook, else `waiting` for the end, `due`, `delivered` or `given up`.
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
        """Return its place in the list of its owner's jobs."""
        return ListPlace(self.created_at_s, self.job_id)

    @property
    def preview(self) -> StoredImage | None:
        """What it will look like, as far as is known while it runs."""
        if self.status != "running" or self.result is None:
            return None
        return self.result.images[-1]


@dataclass(frozen=True)
class Lease:
    """The right to do a job, until another attempt takes it: it is known by the attempt."""

    job: Job

    @property
    def job_id(self) -> str:
        """Whose it is."""
        return self.job.job_id

    @property
    def attempt(self) -> int:
        """A number that no other lease of the job has."""
        return self.job.attempt
