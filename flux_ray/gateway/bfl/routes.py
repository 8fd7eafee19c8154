"""The routes of BFL's API: `POST /v1/<model>` submits a job, `/v1/get_result` polls it.

`/v1/jobs`, which lists a key's jobs, and `/v1/cancel` are ours. `job_service_for` makes a gateway's
job service, which posts webhooks as BFL does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flux_ray.catalog import tier_for
from flux_ray.config import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.bfl.answer import (
    AsyncResponse,
    Credits,
    Finetunes,
    JobList,
    ResultResponse,
    accepted,
    listed,
    message_for,
    result_of,
)
from flux_ray.gateway.bfl.fields import BflFields, fields_schema, parse_body
from flux_ray.gateway.bfl.request import images_of, job_request_for, job_warnings_for
from flux_ray.gateway.callers import SPILL
from flux_ray.gateway.errors import COMFY, GENERATE, BflFailure, path_of
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.jobs import PARAMETER, JobGenerator, JobSubmitter, idempotency_of, memo_of
from flux_ray.gateway.model_names import names_of
from flux_ray.gateway.openai.routes import JSON, content_type_of
from flux_ray.gateway.results import preview_url_of, sample_url_of, urls_for
from flux_ray.gateway.submit import Submitter
from flux_ray.gateway.upsampling.rewriting import PromptRewriter
from flux_ray.gateway.webhooks import Poster, webhook_of
from flux_ray.jobs.census import ShowCensus
from flux_ray.jobs.job import Idempotency, Job, State, Webhook
from flux_ray.jobs.service import JobService
from flux_ray.jobs.webhooks import Mail
from flux_ray.router.router import Router


def job_service_for(
    router: Router,
    args: GatewayArgs,
    poster: Poster | None = None,
    show_census: ShowCensus | None = None,
) -> JobService | None:
    """Return the job service of a gateway, or None if `args` have no jobs.

    `poster` takes the place of the one that `args.webhooks` describe, in tests. `show_census` is
    called with the numbers of jobs every few seconds.
    """
    if args.jobs is None or args.public_url is None:
        return None
    public_url = args.public_url

    async def message_of(job: Job) -> bytes:
        # Signed anew for each try: the URL of the first one may have expired.
        return message_for(job, sample_url_of(job, await urls_for(job_service, public_url)))

    poster = poster or Poster(args.webhooks)
    mail = Mail(message_of, poster.post, args.webhooks.timeout_s)
    generation = JobGenerator(router, args)
    job_service = JobService(
        args.jobs,
        generation.generate,
        generation.progress_of,
        mail,
        generation.preview_of,
        generation.standing_of,
        tiers=args.tiers,
        show_census=show_census,
    )
    return job_service


RESULT = "/v1/get_result"
# These two are ours: BFL has no such routes.
CANCEL = "/v1/cancel"
JOBS = "/v1/jobs"
CREDITS = "/v1/credits"
FINETUNES = "/v1/my_finetunes"
PATHS = ("/v1/{}", f"{COMFY}{{}}{GENERATE}")
# The credits of a key without a limit: BFL's clients expect a number.
UNLIMITED_CREDITS = 1e9


class Bfl:
    """The endpoints of BFL's API at one gateway; polling URLs begin with `public_url`."""

    def __init__(
        self,
        router: Router,
        args: GatewayArgs,
        job_service: JobService,
        public_url: str,
        fetcher: Fetcher,
        rewriter: PromptRewriter | None = None,
    ) -> None:
        self.submitter = Submitter(router, args, rewriter)
        self.job_service = job_service
        self.jobs = JobSubmitter(router, job_service)
        self.fetcher = fetcher
        self.limits = args.limits
        self.webhooks = args.webhooks
        self.public_url = public_url.rstrip("/")
        # Model names by the unquoted path at which their jobs are submitted.
        self.names = {path.format(n): n for n in names_of(args) for path in PATHS}

    @property
    def paths(self) -> frozenset[str]:
        """Return the paths of all routes, on which errors have BFL's shape."""
        return frozenset({RESULT, CANCEL, JOBS, CREDITS, FINETUNES, *self.names})

    def routes(self) -> APIRouter:
        """Return a router with a route for each tier and alias, and those that all share."""
        routes = APIRouter(tags=["bfl"], responses={"default": {"model": BflFailure}})
        content = {JSON: {"schema": fields_schema()}}
        extra = {
            "requestBody": {"required": True, "content": content},
            "parameters": [SPILL, PARAMETER],
        }
        for path, name in self.names.items():
            routes.add_api_route(
                path,
                self.route_for(name),
                methods=["POST"],
                response_model=AsyncResponse,
                openapi_extra=extra,
                name=f"submit to {name}",
            )
        unknown: dict[int | str, dict[str, Any]] = {404: {"model": ResultResponse}}
        routes.add_api_route(
            RESULT, self.get_result, response_model=ResultResponse, responses=unknown
        )
        routes.add_api_route(
            CANCEL, self.cancel, methods=["POST"], response_model=ResultResponse, responses=unknown
        )
        routes.add_api_route(JOBS, self.list_jobs, response_model=JobList)
        routes.add_api_route(CREDITS, self.credits)
        routes.add_api_route(FINETUNES, self.my_finetunes)
        return routes

    def route_for(self, name: str) -> Callable[[Request], Awaitable[AsyncResponse]]:
        """Return the endpoint that submits jobs to one model."""

        async def submit(request: Request) -> AsyncResponse:
            """Submit a job; its image is there when `polling_url` says Ready."""
            return await self.submit(request, name)

        return submit

    async def submit(self, http: Request, name: str) -> AsyncResponse:
        """Read the body and accept a job, or find the one with the same idempotency key."""
        content_type_of(http, JSON)
        body = await http.body()
        sent = parse_body(body)
        webhook = webhook_of(sent.webhook_url, sent.webhook_secret, self.webhooks)
        named = await asyncio.to_thread(idempotency_of, http, body)
        job = await self.jobs.known(http, named)
        if job is None:
            job = await self.hand_in(http, sent, name, named, webhook)
        # ComfyUI's nodes send their key only to URLs that are relative to their own base.
        base = "" if path_of(http.scope).startswith(COMFY) else self.public_url
        return accepted(job, f"{base}{RESULT}?id={job.job_id}", sent.webhook_url)

    async def hand_in(
        self,
        http: Request,
        sent: BflFields,
        name: str,
        named: Idempotency | None,
        webhook: Webhook | None,
    ) -> Job:
        """Read the images, choose the tier, and accept a new job."""
        target = self.submitter.target_of(http, name)
        images = await images_of(sent, target, self.limits, self.fetcher)
        prepared = await self.submitter.take(
            http,
            target,
            lambda tier: job_request_for(sent, name, tier, self.limits, images, target.served),
        )
        request = await self.jobs.choose(prepared)
        # Before the job is stored: whoever runs it, however often, finds the same words.
        rewriting = await self.submitter.upsample(http, request, prepared.caller, sent.upsampling)
        request = rewriting.rewritten(request)
        prepared = prepared._replace(caller=rewriting.charged(prepared.caller))
        read = sum(each.width * each.height for each in images.references) / 1e6
        tier = tier_for(request.tier)
        memo = {
            "cost": round(self.submitter.router.gpu_seconds(request) + rewriting.gpu_s, 4),
            "input_mp": round(read, 2),
            "output_mp": round(request.megapixels, 2),
            "warnings": (
                *job_warnings_for(sent, name, request, tier, images.references),
                *rewriting.notes_on(request.tier),
                *images.notes,
            ),
        } | memo_of(rewriting)
        metadata = sent.metadata or {}
        return await self.jobs.accept(http, prepared, request, memo, named, webhook, metadata)

    async def get_result(self, request: Request, id: str = Query(max_length=200)) -> Response:
        """Return the state of a job of this key; jobs of other keys are not found."""
        return await self.answer_for(await self.jobs.find(request, id), id)

    async def cancel(self, request: Request, id: str = Query(max_length=200)) -> Response:
        """Cancel a job unless it has ended, and return its state."""
        await self.jobs.cancel(request, id)
        return await self.get_result(request, id)

    async def answer_for(self, job: Job | None, job_id: str) -> Response:
        """Return the answer to a poll; a 404 has a full body too, as some clients read it."""
        if job is None:
            body, status = ResultResponse(id=job_id, status="Task not found"), 404
        else:
            urls = await urls_for(self.job_service, self.public_url)
            # One more query, and so only for jobs that wait.
            num_before = None
            if job.status == "pending":
                num_before = await self.job_service.position_of(job.job_id)
            sample_url, preview_url = sample_url_of(job, urls), preview_url_of(job, urls)
            body, status = result_of(job, sample_url, preview_url, num_before), 200
        return JSONResponse(body.model_dump(), status, {"cache-control": "no-store"})

    async def list_jobs(
        self,
        request: Request,
        limit: int = Query(20, ge=1, le=100),
        before: str | None = Query(None, max_length=200, description="of the page before"),
        status: State | None = None,
    ) -> JobList:
        """List the jobs of this key, newest first, all or those in one state."""
        after = None
        if before is not None:
            last = await self.jobs.find(request, before)
            if last is None:
                raise BadRequest("before is no job of this key, or not any more", "before")
            after = last.place
        found = await self.jobs.list(request, limit, after, status)
        urls = await urls_for(self.job_service, self.public_url)
        jobs = [listed(job, sample_url_of(job, urls), preview_url_of(job, urls)) for job in found]
        return JobList(jobs=jobs, before=found[-1].job_id if len(found) == limit else None)

    async def credits(self, request: Request) -> Credits:
        """Return the GPU seconds that the key may still use today."""
        left = await self.submitter.credits(request)
        return Credits(credits=UNLIMITED_CREDITS if left is None else left)

    async def my_finetunes(self) -> Finetunes:
        """Return an empty list: only the operator can add adapters here."""
        return Finetunes(finetunes=[])
