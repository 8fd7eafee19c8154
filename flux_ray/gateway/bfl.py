"""BFL's routes: a job for each `POST /v1/<model>`, which is asked for until it is ready."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flux_ray.catalog import tier_for
from flux_ray.gateway.bfl_answer import (
    Accepted,
    Credits,
    Finetunes,
    Result,
    accepted,
    result_of,
)
from flux_ray.gateway.bfl_failure import BflFailure
from flux_ray.gateway.bfl_fields import BflFields, parse_body
from flux_ray.gateway.bfl_pictures import pictures_of
from flux_ray.gateway.bfl_request import job_request_for, job_warnings_for
from flux_ray.gateway.callers import SPILL
from flux_ray.gateway.dialects import COMFY, GENERATE, path_of
from flux_ray.gateway.fetch import Fetcher
from flux_ray.gateway.job_orders import PARAMETER, JobOrders, idempotency_of
from flux_ray.gateway.openai import JSON, content_type_of
from flux_ray.gateway.orders import Orders
from flux_ray.gateway.result_urls import preview_url_of, sample_url_of, urls_for
from flux_ray.gateway.targets import names_of
from flux_ray.gateway.webhooks import webhook_of
from flux_ray.gateway_config import GatewayArgs
from flux_ray.jobs.desk import Desk
from flux_ray.jobs.job import Idempotency, Job, Webhook
from flux_ray.router.router import Router

RESULT = "/v1/get_result"
# Ours: BFL has no such route.
CANCEL = "/v1/cancel"
CREDITS = "/v1/credits"
FINETUNES = "/v1/my_finetunes"
PATHS = ("/v1/{}", f"{COMFY}{{}}{GENERATE}")
# What a path may be made of; these are others' already.
_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
TAKEN = {"images/generations", "images/edits", "cancel"}
# To who has no limit: BFL's clients expect a number.
UNLIMITED_CREDITS = 1e9


class Bfl:
    """The routes. `public_url` is where clients find them."""

    def __init__(
        self, router: Router, args: GatewayArgs, desk: Desk, public_url: str, fetcher: Fetcher
    ) -> None:
        self.orders = Orders(router, args)
        self.desk = desk
        self.jobs = JobOrders(router, desk)
        self.fetcher = fetcher
        self.limits = args.limits
        self.webhooks = args.webhooks
        self.public_url = public_url.rstrip("/")
        names = [n for n in names_of(args) if _NAME.fullmatch(n) and n not in TAKEN]
        # By the path at which jobs of it are handed in.
        self.names = {path.format(n): n for n in names for path in PATHS}

    @property
    def paths(self) -> frozenset[str]:
        """All of its routes: their errors have BFL's shape."""
        return frozenset({RESULT, CANCEL, CREDITS, FINETUNES, *self.names})

    def routes(self) -> APIRouter:
        """A route for each tier and alias, with a description of its own."""
        routes = APIRouter(tags=["bfl"], responses={"default": {"model": BflFailure}})
        content = {JSON: {"schema": BflFields.model_json_schema()}}
        extra = {
            "requestBody": {"required": True, "content": content},
            "parameters": [SPILL, PARAMETER],
        }
        for path, name in self.names.items():
            routes.add_api_route(
                path,
                self.route_for(name),
                methods=["POST"],
                response_model=Accepted,
                openapi_extra=extra,
                name=f"submit to {name}",
            )
        unknown: dict[int | str, dict[str, Any]] = {404: {"model": Result}}
        routes.add_api_route(RESULT, self.get_result, response_model=Result, responses=unknown)
        routes.add_api_route(
            CANCEL, self.cancel, methods=["POST"], response_model=Result, responses=unknown
        )
        routes.add_api_route(CREDITS, self.credits)
        routes.add_api_route(FINETUNES, self.my_finetunes)
        return routes

    def route_for(self, name: str) -> Callable[[Request], Awaitable[Accepted]]:
        """The endpoint of one model."""

        async def submit(request: Request) -> Accepted:
            """A job; its picture is there when `polling_url` says Ready."""
            return await self.submit(request, name)

        return submit

    async def submit(self, http: Request, name: str) -> Accepted:
        """From the body to a job that is kept."""
        content_type_of(http, JSON)
        body = await http.body()
        sent = parse_body(body)
        webhook = webhook_of(sent.webhook_url, sent.webhook_secret, self.webhooks)
        named = await asyncio.to_thread(idempotency_of, http, body)
        job = await self.jobs.known(http, named)
        if job is None:
            job = await self.hand_in(http, sent, name, named, webhook)
        # ComfyUI's nodes say who they are only where the URL is relative to their own base.
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
        """A new job, of which nobody has heard."""
        target = self.orders.target_of(http, name)
        pictures = await pictures_of(sent, target, self.limits, self.fetcher)
        order = await self.orders.take(
            http,
            target,
            lambda tier: job_request_for(sent, name, tier, self.limits, pictures),
        )
        request = await self.jobs.choose(order)
        read = sum(each.width * each.height for each in pictures.references) / 1e6
        tier = tier_for(request.tier)
        memo = {
            "cost": round(self.orders.router.gpu_seconds(request), 4),
            "input_mp": round(read, 2),
            "output_mp": round(request.megapixels, 2),
            "warnings": job_warnings_for(sent, name, request, tier, pictures.references),
        }
        return await self.jobs.accept(http, order, request, memo, named, webhook)

    async def get_result(self, request: Request, id: str = Query(max_length=200)) -> Response:
        """What became of a job; other people's are as if they were not there."""
        return await self.answer_for(await self.jobs.find(request, id), id)

    async def cancel(self, request: Request, id: str = Query(max_length=200)) -> Response:
        """End a job that has not ended; what became of it."""
        await self.jobs.cancel(request, id)
        return await self.get_result(request, id)

    async def answer_for(self, job: Job | None, job_id: str) -> Response:
        """Not known is a whole body, too: some clients read it."""
        if job is None:
            body, status = Result(id=job_id, status="Task not found"), 404
        else:
            urls = await urls_for(self.desk, self.public_url)
            body = result_of(job, sample_url_of(job, urls), preview_url_of(job, urls))
            status = 200
        return JSONResponse(body.model_dump(), status, {"cache-control": "no-store"})

    async def credits(self, request: Request) -> Credits:
        """What the key may still use today."""
        left = await self.orders.credits(request)
        return Credits(credits=UNLIMITED_CREDITS if left is None else left)

    async def my_finetunes(self) -> Finetunes:
        """None: adapters are the operator's here."""
        return Finetunes(finetunes=[])
