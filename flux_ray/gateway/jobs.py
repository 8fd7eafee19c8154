"""Connect the gateway to its jobs: submit them, find them, and have them generated.

`JobSubmitter` is what a dialect uses to accept jobs and to look them up for their owners.
`JobGenerator` is what the job service calls to run one through the router. `within_budget` loads a
job's references only when the memory budget has room: jobs were accepted, so they wait for it
instead of being refused.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.requests import Request

from flux_ray.config import GatewayArgs, Limits
from flux_ray.errors import TierUnavailable
from flux_ray.gateway import callers as idempotency
from flux_ray.gateway.callers import allowance_of, class_name_of, name_of
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.gateway.model_names import UNLIMITED
from flux_ray.gateway.submit import PreparedRequest
from flux_ray.gateway.upsampling.rewriting import Rewriting
from flux_ray.jobs.images import is_job_id
from flux_ray.jobs.job import Idempotency, Job, JobSubmission, ListPlace, State, Webhook
from flux_ray.jobs.service import JobService
from flux_ray.jobs.store import too_many
from flux_ray.request import (
    DeferredRequest,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    Preview,
    Progress,
    QueuePosition,
    RequestEvent,
)
from flux_ray.router.quote import NO_CLASS, Caller
from flux_ray.router.router import Router
from flux_ray.tracing import TRACEPARENT, traceparent

# The pixels, and beside them first the file that they are decoded from, then the message in which
# they are sent.
COPIES = 2


def within_budget(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Return the request with its pixels counted in the memory budget while they are loaded.

    They are counted from just before they are loaded until nobody holds them.
    """
    num_bytes = COPIES * num_pixel_bytes(request)
    if not isinstance(request, DeferredRequest) or not num_bytes:
        return request
    load = request.load

    async def load_within() -> ImageRequest:
        share = await MEMORY.room(num_bytes, limits.max_kept_bytes)
        try:
            return share.hold_with(await load())
        except BaseException:
            share.release()
            raise

    return replace(request, load=load_within)


def num_pixel_bytes(request: ImageRequest) -> int:
    """Return how many bytes the references and the mask take, by their sizes."""
    pixels = sum(3 * each.width * each.height for each in request.references)
    return pixels if request.mask is None else pixels + request.mask.width * request.mask.height


# The field of a job's memo with the class of the key under which it was accepted.
KEY_CLASS = "key_class"

# Those with the seconds that upsampling its prompt took, if that was tried, and its price.
UPSAMPLING_S, UPSAMPLING_GPU_S = "upsampling_s", "upsampling_gpu_s"


def memo_of(rewriting: Rewriting) -> dict[str, Any]:
    """Return what a job's memo keeps of the upsampling of its prompt, which its row has already."""
    if rewriting.seconds is None:
        return {}
    return {UPSAMPLING_S: round(rewriting.seconds, 4), UPSAMPLING_GPU_S: rewriting.gpu_s}


# A job may wait this share of its time for a replica; the rest is for generating. A job that gets
# no replica in time stays queued, but one whose time ends while it is generated has lost its work.
QUEUE_SHARE = 0.75


class JobGenerator:
    """Runs jobs through the router; the job service calls it for each attempt.

    It also keeps the latest progress, preview and queue position of each running job, for those who
    poll it.
    """

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args
        self._progress: dict[str, float] = {}
        self._previews: dict[str, GeneratedImage] = {}
        self._standings: dict[str, QueuePosition] = {}

    async def generate(self, job: Job, request: ImageRequest) -> ImageResult:
        """Return the job's images, and note its news meanwhile. Raise what the router raises."""
        request = within_budget(request, self.args.limits)

        def note(event: RequestEvent) -> None:
            if isinstance(event, QueuePosition):
                self._standings[request.request_id] = event
                return
            # Any other news means that a replica was assigned.
            self._standings.pop(request.request_id, None)
            if isinstance(event, Progress):
                self._progress[request.request_id] = event.share
            elif isinstance(event, Preview):
                self._previews[request.request_id] = event.image

        try:
            return await self.router.generate(request, replace(self.caller_of(job), on_event=note))
        finally:
            self._progress.pop(request.request_id, None)
            self._previews.pop(request.request_id, None)
            self._standings.pop(request.request_id, None)

    def progress_of(self, request_id: str) -> float | None:
        """Return the share of the steps done, from 0 to 1; None if it is not known."""
        return self._progress.get(request_id)

    def standing_of(self, request_id: str) -> QueuePosition | None:
        """Return where a request waits for a replica; None if it does not, or that is not known."""
        return self._standings.get(request_id)

    def preview_of(self, request_id: str) -> GeneratedImage | None:
        """Return the latest preview of a request; None if there is none."""
        return self._previews.get(request_id)

    def caller_of(self, job: Job) -> Caller:
        """Return the job's owner as the router's caller, limited only by what is counted per day.

        The limits on jobs at once and on requests a minute were applied when the job was accepted.
        """
        name = job.memo.get(KEY_CLASS, NO_CLASS)
        key_class = self.args.key_classes.get(name, UNLIMITED)
        allowance = replace(allowance_of(key_class), max_concurrent=None, requests_per_minute=None)
        return Caller(
            key=job.owner,
            traceparent=job.memo.get(TRACEPARENT, ""),
            weight=key_class.weight,
            deadline_s=self.args.request_timeout_s * QUEUE_SHARE,
            allowance=allowance,
            key_class=name,
            spent_gpu_s=job.memo.get(UPSAMPLING_GPU_S, 0.0),
            is_job=True,
        )


PARAMETER: dict[str, Any] = idempotency.PARAMETER | {
    "description": "A name of the caller's own: the same request again is the same job.",
}
# Seconds to wait for the ledger when it counts a job: the client is waiting for its answer.
COUNT_S = 5.0


class JobSubmitter:
    """What a dialect uses to submit, find, list and cancel the jobs of a caller."""

    def __init__(self, router: Router, job_service: JobService) -> None:
        self.router = router
        self.job_service = job_service

    async def known(self, http: Request, named: Idempotency | None) -> Job | None:
        """Return the job that the caller already submitted under that name, without counting it."""
        return None if named is None else await self.job_service.known(name_of(http), named)

    async def choose(self, prepared: PreparedRequest) -> ImageRequest:
        """Return the request for the tier that will generate it; the job keeps that tier."""
        return await self.router.choose(prepared.target.alias, prepared.requests, prepared.caller)

    async def accept(
        self,
        http: Request,
        prepared: PreparedRequest,
        request: ImageRequest,
        memo: dict[str, Any],
        named: Idempotency | None,
        webhook: Webhook | None,
        metadata: Mapping[str, str],
    ) -> Job:
        """Count the job against the caller's limits and store it; from then on it is never lost.

        Raise RateLimited or QuotaTooSmall if it exceeds a limit, and TierUnavailable if the ledger
        does not count it in time.
        """
        owner = name_of(http)
        if (key_class := class_name_of(http)) is not None:
            memo = memo | {KEY_CLASS: key_class}
        if traced_by := traceparent():
            memo = memo | {TRACEPARENT: traced_by}
        # Waiting jobs count as concurrent, too. The store has the last word, as it counts exactly;
        # asking first avoids charging a job to the day that will then be refused.
        max_active = prepared.caller.allowance.max_concurrent
        if max_active is not None and await self.job_service.num_active(owner) >= max_active:
            raise too_many(max_active)
        allowance = replace(prepared.caller.allowance, max_concurrent=None)
        try:
            async with asyncio.timeout(COUNT_S):
                await self.router.count_in(request, replace(prepared.caller, allowance=allowance))
        except TimeoutError:
            raise TierUnavailable("limits cannot be counted now") from None
        return await self.job_service.accept(
            JobSubmission(owner, request, named, webhook, memo, max_active, metadata)
        )

    async def find(self, http: Request, job_id: str) -> Job | None:
        """Return the caller's job, or None; other callers' jobs are as if they did not exist."""
        return await self.job_service.find(name_of(http), job_id) if is_job_id(job_id) else None

    async def list(
        self, http: Request, limit: int, before: ListPlace | None, state: State | None
    ) -> tuple[Job, ...]:
        """Return a page of the caller's jobs, newest first."""
        return await self.job_service.list(name_of(http), limit=limit, before=before, state=state)

    async def cancel(self, http: Request, job_id: str) -> None:
        """Cancel the caller's job unless it has ended."""
        if is_job_id(job_id):
            await self.job_service.cancel(name_of(http), job_id)


def idempotency_of(http: Request, body: bytes) -> Idempotency | None:
    """Return the idempotency key, if any, with a digest of the request's path and body."""
    sent = idempotency.idempotency_key_of(http)
    if sent is None:
        return None
    asked = http.scope["path"].encode() + b"\n" + body
    return Idempotency(sent, sha256(asked).hexdigest())
