"""Hands orders in as jobs, and finds them again for their owners."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from starlette.requests import Request

from flux_ray.errors import TierUnavailable
from flux_ray.gateway import idempotency
from flux_ray.gateway.callers import key_of, name_of
from flux_ray.gateway.jobs import KEY_CLASS
from flux_ray.gateway.submit import PreparedRequest
from flux_ray.jobs.job import Idempotency, Job, JobSubmission, ListPlace, State, Webhook
from flux_ray.jobs.results import is_job_id
from flux_ray.jobs.service import JobService
from flux_ray.jobs.store import too_many
from flux_ray.request import ImageRequest
from flux_ray.router.router import Router

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
