"""Has jobs drawn by the router, on behalf of those who handed them in.

Loads the references of jobs when there is room for them: they were accepted, so they wait.

Hands orders in as jobs, and finds them again for their owners.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.requests import Request

from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.errors import TierUnavailable
from flux_ray.gateway import callers as idempotency
from flux_ray.gateway.callers import allowance_of, key_of, name_of
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.gateway.model_names import UNLIMITED
from flux_ray.gateway.submit import PreparedRequest
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
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

# The pixels, and first what they are unpacked from, then what they are sent in.
COPIES = 2


def within_budget(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Return the request, whose pixels are counted from before they are loaded until they go."""
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
    """Of all its references and its mask, by their sizes."""
    pixels = sum(3 * each.width * each.height for each in request.references)
    return pixels if request.mask is None else pixels + request.mask.width * request.mask.height


# Of a job's memo: the class of the key that it was accepted from.
KEY_CLASS = "key_class"

QUEUE_SHARE = 0.75


class JobGenerator:
    """What a Desk calls for each attempt at a job."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args
        self._progress: dict[str, float] = {}
        self._previews: dict[str, GeneratedImage] = {}
        self._standings: dict[str, QueuePosition] = {}

    async def generate(self, job: Job, request: ImageRequest) -> ImageResult:
        """The job's images; raises as the router does."""
        request = within_budget(request, self.args.limits)

        def note(event: RequestEvent) -> None:
            if isinstance(event, QueuePosition):
                self._standings[request.request_id] = event
                return
            # It has been granted a replica.
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
        """How far a request has come, from 0 to 1; None if nothing was heard of it."""
        return self._progress.get(request_id)

    def standing_of(self, request_id: str) -> QueuePosition | None:
        """Where a request waits for a replica; None if it does not, or nothing was heard of it."""
        return self._standings.get(request_id)

    def preview_of(self, request_id: str) -> GeneratedImage | None:
        """What a request's image will look like; None if nothing was heard of that."""
        return self._previews.get(request_id)

    def caller_of(self, job: Job) -> Caller:
        """Its owner, who waits as long as it takes.

        How many jobs and how often was asked when they were accepted; what is left is the day's.
        """
        key_class = self.args.key_classes.get(job.memo.get(KEY_CLASS, ""), UNLIMITED)
        allowance = replace(allowance_of(key_class), max_concurrent=None, requests_per_minute=None)
        return Caller(
            key=job.owner,
            weight=key_class.weight,
            # The rest is for the drawing: a job that gets no turn in time waits on, as one whose
            # time is over while it is drawn was lost.
            deadline_s=self.args.request_timeout_s * QUEUE_SHARE,
            allowance=allowance,
            is_job=True,
        )


PARAMETER: dict[str, Any] = idempotency.PARAMETER | {
    "description": "A name of the caller's own: the same request again is the same job.",
}
# While the ledger is away, a client is not to wait for it.
COUNT_S = 5.0


class JobSubmitter:
    """The way from a dialect to the jobs of this gateway."""

    def __init__(self, router: Router, desk: JobService) -> None:
        self.router = router
        self.desk = desk

    async def known(self, http: Request, named: Idempotency | None) -> Job | None:
        """The job of the same request, if the caller gave it a name: nothing is counted again."""
        return None if named is None else await self.desk.known(name_of(http), named)

    async def choose(self, order: PreparedRequest) -> ImageRequest:
        """The request of the tier that is to draw it; it stays with that."""
        return await self.router.choose(order.target.alias, order.requests, order.caller)

    async def accept(
        self,
        http: Request,
        order: PreparedRequest,
        request: ImageRequest,
        memo: dict[str, Any],
        named: Idempotency | None,
        webhook: Webhook | None,
        metadata: Mapping[str, str],
    ) -> Job:
        """The job, which is never lost. RateLimited or QuotaTooSmall if it is too much."""
        owner = name_of(http)
        key = key_of(http)
        if key is not None and key.key_class is not None:
            memo = memo | {KEY_CLASS: key.key_class}
        # How many at once are jobs that wait, too: the store counts them, exactly in the end.
        max_active = order.caller.allowance.max_concurrent
        if max_active is not None and await self.desk.num_active(owner) >= max_active:
            raise too_many(max_active)
        allowance = replace(order.caller.allowance, max_concurrent=None)
        try:
            async with asyncio.timeout(COUNT_S):
                await self.router.count_in(request, replace(order.caller, allowance=allowance))
        except TimeoutError:
            raise TierUnavailable("limits cannot be counted now") from None
        return await self.desk.accept(
            JobSubmission(owner, request, named, webhook, memo, max_active, metadata)
        )

    async def find(self, http: Request, job_id: str) -> Job | None:
        """The caller's job; other people's are as if they were not there."""
        return await self.desk.find(name_of(http), job_id) if is_job_id(job_id) else None

    async def list(
        self, http: Request, limit: int, before: ListPlace | None, state: State | None
    ) -> tuple[Job, ...]:
        """Return a page of the caller's jobs, newest first."""
        return await self.desk.list(name_of(http), limit=limit, before=before, state=state)

    async def cancel(self, http: Request, job_id: str) -> None:
        """End the caller's job, if it has not ended."""
        if is_job_id(job_id):
            await self.desk.cancel(name_of(http), job_id)


def idempotency_of(http: Request, body: bytes) -> Idempotency | None:
    """The caller's own name for this request, with a digest of what it asks."""
    sent = idempotency.idempotency_key_of(http)
    if sent is None:
        return None
    asked = http.scope["path"].encode() + b"\n" + body
    return Idempotency(sent, sha256(asked).hexdigest())
