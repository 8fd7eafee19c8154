"""OpenAI's image routes: `/v1/images/generations` and `/v1/images/edits`."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.catalog import tier_for
from flux_ray.config import GatewayArgs
from flux_ray.errors import WrongContentType
from flux_ray.gateway.callers import PARAMETERS
from flux_ray.gateway.edit_form import image_parts, open_form, read_references, text_parts
from flux_ray.gateway.failures import Envelope
from flux_ray.gateway.openai_answer import Answer, answer_for
from flux_ray.gateway.openai_fields import ImageFields, parse_json, parse_text
from flux_ray.gateway.openai_request import request_for
from flux_ray.gateway.openai_stream import EVENT_STREAM, Kind, parts_of, stream
from flux_ray.gateway.openai_warnings import warnings_for
from flux_ray.gateway.orders import Orders
from flux_ray.gateway.targets import Target
from flux_ray.request import Raster
from flux_ray.router.router import Router

JSON = "application/json"
FORM = "multipart/form-data"
EVENTS = {
    "type": "object",
    "description": "with `stream`: each picture, and each preview where the model is a cascade",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}


class OpenAIImages:
    """The two routes."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.orders = Orders(router, args)
        self.limits = args.limits

    def routes(self) -> APIRouter:
        """Bodies are read here, not by FastAPI: within limits, and with our own errors."""
        routes = APIRouter(
            tags=["images"],
            responses={
                200: {"model": Answer, "content": {EVENT_STREAM: {"schema": EVENTS}}},
                "default": {"model": Envelope},
            },
        )
        for path, endpoint, body in (
            ("/v1/images/generations", self.generations, body_schema(JSON)),
            ("/v1/images/edits", self.edits, body_schema(FORM)),
        ):
            extra = body | {"parameters": PARAMETERS}
            routes.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra)
        return routes

    async def generations(self, request: Request) -> Response:
        """Pictures from words."""
        started_s = time.monotonic()
        check_content_type(request, JSON)
        fields = parse_json(await request.body())
        target = self.orders.target_of(request, fields.model)
        return await self.generate(request, fields, target, (), started_s)

    async def edits(self, request: Request) -> Response:
        """Pictures from words and one or more reference pictures."""
        started_s = time.monotonic()
        check_content_type(request, FORM)
        async with open_form(request, self.limits) as form:
            fields = parse_text(text_parts(form))
            target = self.orders.target_of(request, fields.model)
            files = image_parts(form, target)
            references = await read_references(files, self.limits)
        return await self.generate(request, fields, target, references, started_s)

    async def generate(
        self,
        http: Request,
        fields: ImageFields,
        target: Target,
        references: tuple[Raster, ...],
        started_s: float,
    ) -> Response:
        """The way from checked fields to the answer."""
        order = self.orders.take(
            http, target, lambda tier: request_for(fields, tier, self.limits, references)
        )
        if fields.stream:
            kind: Kind = "image_edit" if references else "image_generation"
            return await stream(parts_of(self.orders, order), order, fields, kind)
        result = await self.orders.draw(order)
        warnings = warnings_for(fields, tier_for(result.tier))
        return answer_for(order.request_of(result), result, warnings, started_s)


def check_content_type(request: Request, wanted: str) -> None:
    """Raises unless the body says that it is what the route reads."""
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != wanted:
        raise WrongContentType(f"send the body as {wanted}")


def body_schema(content_type: str) -> dict[str, Any]:
    """What OpenAPI says of a body."""
    schema = ImageFields.model_json_schema()
    if content_type == FORM:
        files = {"type": "array", "items": {"type": "string", "format": "binary"}}
        schema["properties"] |= {"image": files, "image[]": files}
        schema["anyOf"] = [{"required": ["image"]}, {"required": ["image[]"]}]
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}
