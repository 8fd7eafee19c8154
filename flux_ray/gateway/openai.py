"""OpenAI's image routes: `/v1/images/generations` and `/v1/images/edits`."""

import logging
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.config import GatewayArgs
from flux_ray.errors import DeadlineTooShort, WrongContentType
from flux_ray.gateway.edit_form import image_parts, open_form, read_references, text_parts
from flux_ray.gateway.failures import Envelope
from flux_ray.gateway.openai_answer import Answer, answer_for
from flux_ray.gateway.openai_fields import ImageFields, parse_json, parse_text
from flux_ray.gateway.openai_request import request_for
from flux_ray.gateway.openai_warnings import warnings_for
from flux_ray.gateway.tiers import served_tier
from flux_ray.gateway.urgency import DEADLINE, DEADLINE_PARAMETER, deadline_of, key_of
from flux_ray.request import Raster
from flux_ray.router.router import Router

logger = logging.getLogger("ray.serve")

JSON = "application/json"
FORM = "multipart/form-data"


class OpenAIImages:
    """The two routes."""

    def __init__(self, router: Router, args: GatewayArgs) -> None:
        self.router = router
        self.args = args

    def routes(self) -> APIRouter:
        """Bodies are read here, not by FastAPI: within limits, and with our own errors."""
        routes = APIRouter(
            tags=["images"],
            responses={200: {"model": Answer}, "default": {"model": Envelope}},
        )
        for path, endpoint, body in (
            ("/v1/images/generations", self.generations, body_schema(JSON)),
            ("/v1/images/edits", self.edits, body_schema(FORM)),
        ):
            extra = body | {"parameters": [DEADLINE_PARAMETER]}
            routes.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra)
        return routes

    async def generations(self, request: Request) -> Response:
        """Pictures from words."""
        started_s = time.monotonic()
        check_content_type(request, JSON)
        fields = parse_json(await request.body())
        return await self.generate(request, fields, (), started_s)

    async def edits(self, request: Request) -> Response:
        """Pictures from words and one or more reference pictures."""
        started_s = time.monotonic()
        check_content_type(request, FORM)
        async with open_form(request, self.args.limits) as form:
            fields = parse_text(text_parts(form))
            files = image_parts(form, served_tier(fields.model, self.args))
            references = await read_references(files, self.args.limits)
        return await self.generate(request, fields, references, started_s)

    async def generate(
        self,
        http: Request,
        fields: ImageFields,
        references: tuple[Raster, ...],
        started_s: float,
    ) -> Response:
        """The way from checked fields to the answer; the log joins the client's id with ours."""
        tier = served_tier(fields.model, self.args)
        request = request_for(fields, tier, self.args.limits, references)
        http_id = http.state.request_id
        logger.info("request %s: image request %s on %s", http_id, request.request_id, tier.name)
        deadline_s, key = deadline_of(http), key_of(http)
        try:
            result = await self.router.generate(request, deadline_s=deadline_s, key=key)
        except DeadlineTooShort as error:
            raise DeadlineTooShort(error.message, DEADLINE) from None
        return answer_for(request, result, warnings_for(fields, tier), started_s)


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
