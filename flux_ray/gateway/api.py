"""The gateway's HTTP application: its routes, its middleware and its error handlers.

When the desk of jobs works: while the gateway is served, and to the end of what it draws.
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
from flux_ray.auth.keys import KeyWatch
from flux_ray.config.gateway import GatewayArgs
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
from flux_ray.gateway.results import KeptImages, OwnResultsFirst, ResultRoutes
from flux_ray.jobs.service import JobService
from flux_ray.router.router import Router

# Of the time to drain: to give back what is not done by then, before the process is killed.
GIVE_BACK_S = 10.0
NOTICE_PERIOD_S = 0.5

# Whether this gateway has begun to end; it goes on to answer what it has taken in.
IsStopping = Callable[[], bool]


class ServiceHours(Protocol):
    """What opens and closes: a Desk."""

    async def open(self) -> None:
        """Begin to work."""

    def stop_claiming(self) -> None:
        """Leave to others what is not claimed yet."""

    async def close(self, drain_s: float) -> None:
        """See work end for `drain_s`, and leave the rest to others."""


def never() -> bool:
    """Nobody tells."""
    return False


def lifespan_of(
    desk: ServiceHours | None, drain_timeout_s: float, is_stopping: IsStopping = never
) -> Lifespan[FastAPI]:
    """Open the desk with the application, and close it so that running jobs can end.

    Serve ends an application only when its last request is answered: by then much of
    `drain_timeout_s` may be over, and the desk is to have claimed nothing meanwhile.
    """

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        if desk is None:
            yield
            return
        await desk.open()
        noticing = asyncio.create_task(notice(desk, is_stopping))
        try:
            yield
        finally:
            now_s = asyncio.get_running_loop().time()
            began_s = noticing.result() if noticing.done() else now_s
            noticing.cancel()
            await desk.close(drain_s_of(drain_timeout_s, now_s - began_s))

    return lifespan


async def notice(desk: ServiceHours, is_stopping: IsStopping) -> float:
    """Have the desk claim no more once the gateway is to end; the loop's time of that."""
    while True:
        if is_stopping():
            desk.stop_claiming()
            return asyncio.get_running_loop().time()
        await asyncio.sleep(NOTICE_PERIOD_S)


def drain_s_of(drain_timeout_s: float, passed_s: float) -> float:
    """How long running jobs may go on: a part of the time is kept for what has to follow."""
    kept_s = min(GIVE_BACK_S, drain_timeout_s / 2)
    return max(0.0, drain_timeout_s - kept_s - passed_s)


class Dialect(Protocol):
    """Routes that ask for a key, where keys are asked for."""

    def routes(self) -> APIRouter:
        """All of them."""


BFL_KEY = APIKeyHeader(name="x-key", auto_error=False)
COMFY_KEY = APIKeyHeader(name="x-api-key", scheme_name="x-api-key", auto_error=False)


def bare_api(lifespan: Lifespan[FastAPI]) -> FastAPI:
    """Without routes."""
    return FastAPI(
        title="flux-ray",
        version=__version__,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # The redirect's address would be made of the Host header.
        redirect_slashes=False,
        # Its root span would be no child of Serve's: every request would be two traces.
        telemetry={"tracing": False},
        lifespan=lifespan,
    )


def build_api(
    router: Router,
    args: GatewayArgs,
    *,
    desk: JobService | None = None,
    is_stopping: IsStopping = never,
    proxy_sends_id: bool = False,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """A plain ASGI application. ValueError says why the keys file cannot be used.

    `desk`: of the jobs, where `args.jobs` is given; it is open while the application is.
    `is_stopping`: whether the gateway is to end, from when on its desk claims no more jobs.
    `proxy_sends_id`: a proxy in front puts `x-request-id` on the answers, as Serve's own does.
    """
    api = bare_api(lifespan_of(desk, args.drain_timeout_s, is_stopping))
    api.add_middleware(BodyLimit, limits=args.limits)
    api.add_middleware(Unpacking, max_body_bytes=args.limits.max_body_bytes)
    api.add_middleware(Intake, args=args)
    guards: Sequence[Dependency] = ()
    if args.keys_file is not None:
        api.add_middleware(ApiKeyMiddleware, keys=KeyWatch(args.keys_file, args.key_classes))
        # The door has the say; these are what OpenAPI tells of it.
        guards = [Depends(HTTPBearer(auto_error=False)), Depends(BFL_KEY), Depends(COMFY_KEY)]
    api.add_middleware(RequestId, proxy_sends_id=proxy_sends_id)
    if args.cors_origins:
        # Outermost: preflights have no key, and what is refused is to be read too.
        api.add_middleware(CORSMiddleware, **cors_options(args.cors_origins))
    add_error_handlers(api, proxy_sends_id=proxy_sends_id)
    add_routes(api, router, args, desk, fetcher or Fetcher(args.fetch), guards)
    return api


def add_routes(
    api: FastAPI,
    router: Router,
    args: GatewayArgs,
    desk: JobService | None,
    fetcher: Fetcher,
    guards: Sequence[Dependency],
) -> None:
    """All dialects, and what asks for no key."""
    kept = None
    of_jobs: list[Dialect] = []
    api.state.names = names_of(args)
    api.state.public_url = args.public_url
    api.state.bfl_paths = frozenset()
    if desk is not None and args.public_url is not None:
        fetcher = OwnResultsFirst(fetcher, desk, args.public_url)
        kept = KeptImages(desk, args.public_url)
        # Their URLs are the right to read.
        api.include_router(ResultRoutes(desk, args.public_url).routes())
        bfl = Bfl(router, args, desk, args.public_url, fetcher)
        of_jobs.append(bfl)
        api.state.bfl_paths = bfl.paths
    dialects: list[Dialect] = [
        OpenAIImages(router, args, fetcher, kept),
        HuggingFace(router, args, fetcher),
        Models(args, router.is_deployed),
        *of_jobs,
    ]
    known: set[tuple[str, str]] = set()
    for dialect in dialects:
        routes = dialect.routes()
        known |= methods_and_paths(routes)
        api.include_router(routes, dependencies=guards)
    api.include_router(Health(router).routes())
    # For whoever asks at another path.
    api.state.paths = frozenset(known)


def methods_and_paths(routes: APIRouter) -> set[tuple[str, str]]:
    """Return those of the routes without parameters."""
    return {
        (method, route.path)
        for route in routes.routes
        if isinstance(route, APIRoute) and "{" not in route.path
        for method in route.methods or ()
    }
