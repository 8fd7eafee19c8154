"""OpenAI's image routes: `/v1/images/generations` and `/v1/images/edits`."""

import logging
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.catalog import tier_for
from flux_ray.config import GatewayArgs
from flux_ray.errors import DeadlineTooShort, WrongContentType
from flux_ray.gateway.callers import DEADLINE, PARAMETERS, Callers, may_spill
from flux_ray.gateway.edit_form import image_parts, open_form, read_references, text_parts
from flux_ray.gateway.failures import Envelope
from flux_ray.gateway.openai_answer import Answer, answer_for
from flux_ray.gateway.openai_fields import ImageFields, parse_json, parse_text
from flux_ray.gateway.openai_request import request_for
from flux_ray.gateway.openai_stream import EVENT_STREAM, Kind, parts_of, stream
from flux_ray.gateway.openai_warnings import warnings_for
from flux_ray.gateway.targets import Target, requests_for, target_for
from flux_ray.request import Raster
from flux_ray.router.router import Router

logger = logging.getLogger("ray.serve")

JSON = "application/json"
FORM = "multipart/form-data"
EVENTS = {
    "type": "string",
    "description": "with `stream`: events named `<kind>.partial_image`, `<kind>.completed`",
}


class OpenAIImages:
    """The two routes."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args
        self.callers = Callers(args)

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
        target = self.target_of(request, fields)
        return await self.generate(request, fields, target, (), started_s)

    async def edits(self, request: Request) -> Response:
        """Pictures from words and one or more reference pictures."""
        started_s = time.monotonic()
        check_content_type(request, FORM)
        async with open_form(request, self.args.limits) as form:
            fields = parse_text(text_parts(form))
            target = self.target_of(request, fields)
            files = image_parts(form, target)
            references = await read_references(files, self.args.limits)
        return await self.generate(request, fields, target, references, started_s)

    def target_of(self, http: Request, fields: ImageFields) -> Target:
        """The tiers that may serve it."""
        key_class = self.callers.class_of(http)
        return target_for(fields.model, self.args, key_class, may_spill=may_spill(http))

    async def generate(
        self,
        http: Request,
        fields: ImageFields,
        target: Target,
        references: tuple[Raster, ...],
        started_s: float,
    ) -> Response:
        """The way from checked fields to the answer; the log joins the client's id with ours."""
        requests = requests_for(
            target, lambda tier: request_for(fields, tier, self.args.limits, references)
        )
        caller = self.callers.caller_of(http)
        http_id, image_id = http.state.request_id, requests[0].request_id
        where = f"on {target.name} for {caller.key or 'anybody'}"
        logger.info("request %s: image request %s %s", http_id, image_id, where)
        try:
            if fields.stream:
                kind: Kind = "image_edit" if references else "image_generation"
                parts = parts_of(self.router, target, requests, caller)
                return await stream(parts, requests, fields, kind)
            result = await self.router.generate_by(target.alias, requests, caller)
        except DeadlineTooShort as error:
            raise DeadlineTooShort(error.message, DEADLINE) from None
        request = next(each for each in requests if each.tier == result.tier)
        return answer_for(request, result, warnings_for(fields, tier_for(result.tier)), started_s)


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
