"""Build the gateway's HTTP application: routes, middleware and error handlers.

`build_api` is the entry point. The lifespan below it ties the job service to the application: it
claims jobs while the gateway is served, stops claiming when the gateway is told to stop, and gives
running jobs what is left of the drain time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from fastapi import APIRouter, Depends, FastAPI
from fastapi.params import Depends as Dependency
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from flux_ray import __version__
from flux_ray.auth import KeyWatch
from flux_ray.config import GatewayArgs
from flux_ray.gateway.bfl.routes import Bfl
from flux_ray.gateway.errors import add_error_handlers
from flux_ray.gateway.health import Health
from flux_ray.gateway.http import BodyLimit, RequestId, Unpacking
from flux_ray.gateway.huggingface import HuggingFace
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.intake import Intake
from flux_ray.gateway.middleware import ApiKeyMiddleware, cors_options
from flux_ray.gateway.model_names import names_of
from flux_ray.gateway.models import Models
from flux_ray.gateway.openai.routes import OpenAIImages
from flux_ray.gateway.playground.pages import PageRoutes
from flux_ray.gateway.results import KeptImages, OwnResultsFirst, ResultRoutes
from flux_ray.gateway.upsampling.rewriting import PromptRewriter
from flux_ray.jobs.service import JobService
from flux_ray.router.router import Router

# The end of the drain time, kept free to hand unfinished jobs back to other gateways. Without it
# Serve would kill the process in the middle of that, and the jobs would wait for their leases.
GIVE_BACK_S = 10.0
NOTICE_PERIOD_S = 0.5

# Says whether this gateway was told to stop; it still answers the requests that it has accepted.
IsStopping = Callable[[], bool]


class ServiceHours(Protocol):
    """Something that starts and ends with the application: the JobService."""

    async def open(self) -> None:
        """Start to claim and run jobs."""

    def stop_claiming(self) -> None:
        """Claim no more jobs; those already claimed go on."""

    async def close(self, drain_s: float) -> None:
        """Wait up to `drain_s` for running jobs, then leave the rest to other gateways."""


def never() -> bool:
    """Return False: used where nothing can tell that the gateway is to stop."""
    return False


def lifespan_of(
    job_service: ServiceHours | None, drain_timeout_s: float, is_stopping: IsStopping = never
) -> Lifespan[FastAPI]:
    """Return a lifespan that opens the job service with the application and drains it at the end.

    Serve ends an application only after its last request was answered. By then much of
    `drain_timeout_s` may have passed, so the service stops claiming as soon as `is_stopping` says
    so, and the time since then is taken off the drain.
    """

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        if job_service is None:
            yield
            return
        await job_service.open()
        noticing = asyncio.create_task(notice(job_service, is_stopping))
        try:
            yield
        finally:
            now_s = asyncio.get_running_loop().time()
            began_s = noticing.result() if noticing.done() else now_s
            noticing.cancel()
            await job_service.close(drain_s_of(drain_timeout_s, now_s - began_s))

    return lifespan


async def notice(job_service: ServiceHours, is_stopping: IsStopping) -> float:
    """Stop claiming jobs once `is_stopping()`, and return the loop's time at which that was."""
    while True:
        if is_stopping():
            job_service.stop_claiming()
            return asyncio.get_running_loop().time()
        await asyncio.sleep(NOTICE_PERIOD_S)


def drain_s_of(drain_timeout_s: float, passed_s: float) -> float:
    """Return how many seconds running jobs may still take, `passed_s` after the stop was noticed.

    Up to GIVE_BACK_S, but at most half of `drain_timeout_s`, is kept for what follows the drain.
    """
    kept_s = min(GIVE_BACK_S, drain_timeout_s / 2)
    return max(0.0, drain_timeout_s - kept_s - passed_s)


class Dialect(Protocol):
    """The routes of one API; callers need a key for them if the gateway has a keys file."""

    def routes(self) -> APIRouter:
        """Return all routes of the dialect."""


BFL_KEY = APIKeyHeader(name="x-key", auto_error=False)
COMFY_KEY = APIKeyHeader(name="x-api-key", scheme_name="x-api-key", auto_error=False)


def bare_api(lifespan: Lifespan[FastAPI]) -> FastAPI:
    """Return an application without routes or middleware."""
    return FastAPI(
        title="flux-ray",
        version=__version__,
        # FastAPI's documentation pages load scripts from other hosts; /docs is one of our own.
        docs_url=None,
        redoc_url=None,
        # Starlette builds the redirect's address from the Host header, which the client chooses.
        redirect_slashes=False,
        # FastAPI's root span is not a child of Serve's: each request would become two traces.
        telemetry={"tracing": False},
        lifespan=lifespan,
    )


def build_api(
    router: Router,
    args: GatewayArgs,
    *,
    job_service: JobService | None = None,
    is_stopping: IsStopping = never,
    proxy_sends_id: bool = False,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """Return the gateway's ASGI application. Raise ValueError if the keys file cannot be used.

    `job_service`: required by the routes that keep results; it runs while the application does.
    `is_stopping`: polled; once true, the job service claims nothing more. `proxy_sends_id`: true if
    a proxy in front sets `x-request-id` on answers, as Serve's own does. `fetcher`: reads reference
    images by URL; tests pass their own.
    """
    api = bare_api(lifespan_of(job_service, args.drain_timeout_s, is_stopping))
    # From the inside out: requests pass the last one first.
    api.add_middleware(BodyLimit, limits=args.limits)
    api.add_middleware(Unpacking, max_body_bytes=args.limits.max_body_bytes)
    api.add_middleware(Intake, args=args)
    guards: Sequence[Dependency] = ()
    if args.keys_file is not None:
        keys = KeyWatch(args.keys_file, args.key_classes)
        api.add_middleware(ApiKeyMiddleware, keys=keys, has_pages=args.playground)
        # ApiKeyMiddleware decides. These only make OpenAPI describe the headers.
        guards = [Depends(HTTPBearer(auto_error=False)), Depends(BFL_KEY), Depends(COMFY_KEY)]
    api.add_middleware(RequestId, proxy_sends_id=proxy_sends_id)
    if args.cors_origins:
        # CORS is outermost: preflights carry no key, and a page must be able to read refusals, too.
        api.add_middleware(CORSMiddleware, **cors_options(args.cors_origins))
    add_error_handlers(api, proxy_sends_id=proxy_sends_id)
    add_routes(api, router, args, job_service, fetcher or Fetcher(args.fetch), guards)
    return api


def add_routes(
    api: FastAPI,
    router: Router,
    args: GatewayArgs,
    job_service: JobService | None,
    fetcher: Fetcher,
    guards: Sequence[Dependency],
) -> None:
    """Add the routes of all dialects, guarded by `guards`, and the routes that need no key."""
    kept = None
    rewriter = PromptRewriter(router, args)
    of_jobs: list[Dialect] = []
    # The error handlers read these to tell which dialect a path belongs to.
    api.state.names, api.state.public_url = names_of(args), args.public_url
    api.state.bfl_paths = frozenset()
    if job_service is not None and args.public_url is not None:
        fetcher = OwnResultsFirst(fetcher, job_service, args.public_url)
        kept = KeptImages(job_service, args.public_url)
        # No guards: whoever has a signed URL may read the image.
        api.include_router(ResultRoutes(job_service, args.public_url).routes())
        bfl = Bfl(router, args, job_service, args.public_url, fetcher, rewriter)
        of_jobs.append(bfl)
        api.state.bfl_paths = bfl.paths
    dialects: list[Dialect] = [
        OpenAIImages(router, args, fetcher, kept, rewriter),
        HuggingFace(router, args, fetcher, rewriter),
        Models(args, router.is_deployed),
        *of_jobs,
    ]
    known: set[tuple[str, str]] = set()
    for dialect in dialects:
        routes = dialect.routes()
        known |= methods_and_paths(routes)
        api.include_router(routes, dependencies=guards)
    api.include_router(Health(router).routes())
    if args.playground:
        # No guards: the pages are the same for everybody, and what they call asks for the key.
        api.include_router(PageRoutes().routes())
    # Lets a 404 say which route was meant.
    api.state.paths = frozenset(known)


def methods_and_paths(routes: APIRouter) -> set[tuple[str, str]]:
    """Return (method, path) of the routes without path parameters."""
    return {
        (method, route.path)
        for route in routes.routes
        if isinstance(route, APIRoute) and "{" not in route.path
        for method in route.methods or ()
    }
