"""The gateway's HTTP application: its routes, its middleware and its error handlers."""

from fastapi import FastAPI

from flux_ray import __version__
from flux_ray.config import GatewayArgs
from flux_ray.gateway.body_limit import BodyLimit
from flux_ray.gateway.failures import add_error_handlers
from flux_ray.gateway.health import Health
from flux_ray.gateway.hugging_face import HuggingFace
from flux_ray.gateway.models import Models
from flux_ray.gateway.openai import OpenAIImages
from flux_ray.gateway.request_id import RequestId
from flux_ray.router.router import Router


def build_api(router: Router, args: GatewayArgs, *, proxy_sends_id: bool = False) -> FastAPI:
    """A plain ASGI application.

    `proxy_sends_id`: a proxy in front puts `x-request-id` on the answers, as Serve's own does.
    """
    api = FastAPI(
        title="flux-ray",
        version=__version__,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # The redirect's address would be made of the Host header.
        redirect_slashes=False,
    )
    api.add_middleware(BodyLimit, max_body_bytes=args.limits.max_body_bytes)
    api.add_middleware(RequestId, proxy_sends_id=proxy_sends_id)
    add_error_handlers(api, proxy_sends_id=proxy_sends_id)
    api.include_router(OpenAIImages(router, args).routes())
    api.include_router(HuggingFace(router, args).routes())
    api.include_router(Models(args).routes())
    api.include_router(Health(router).routes())
    return api
