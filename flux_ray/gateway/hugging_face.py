"""Hugging Face's raw endpoint, `POST /models/{model}`: words or a picture in, one picture out."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.body_limit import forget_body, read_body
from flux_ray.gateway.callers import PARAMETERS
from flux_ray.gateway.dialects import HUB
from flux_ray.gateway.failures import HubFailure
from flux_ray.gateway.fetch import Fetcher
from flux_ray.gateway.openai_fields import ImageFields, bad_request, check_json, check_supported
from flux_ray.gateway.openai_references import MASK_FIELDS, PICTURE_FIELDS, REFERENCE_FIELDS
from flux_ray.gateway.openai_request import request_for
from flux_ray.gateway.openai_warnings import MAX_NAMED_FIELDS, warnings_of
from flux_ray.gateway.orders import Order, Orders
from flux_ray.gateway.references import SentImage
from flux_ray.gateway.sources import Source, Sources, is_picture, read_pictures
from flux_ray.gateway.targets import Target
from flux_ray.gateway_config import GatewayArgs
from flux_ray.request import ImageFormat
from flux_ray.router.router import Router

FORMATS: dict[str, ImageFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}
# OpenAI's, of which this route has but one way.
NOT_HERE = {"model", "n", "response_format", "stream"} | MASK_FIELDS
# Of the old API: how to wait, which is not for the client to say here.
OPTIONS = "options"
# Proxies and clients take no more.
MAX_HEADER_CHARS = 4096


class TargetSize(BaseModel):
    """Of the picture, as image_to_image sends it."""

    model_config = ConfigDict(extra="forbid")

    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Parameters(BaseModel):
    """The client's, by OpenAI's names where it has them; a prompt where `inputs` is a picture."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    target_size: TargetSize | None = None


class Inputs(BaseModel):
    """The body: a prompt, or a picture (base64, or its URL) with the prompt as a parameter."""

    model_config = ConfigDict(extra="allow")

    inputs: str
    parameters: Parameters | None = None

    @property
    def wish(self) -> Parameters:
        """All of them, sent or not."""
        return self.parameters or Parameters()


class HuggingFace:
    """The one route; `InferenceClient(model=f"{gateway}/models/tiny")` speaks to it."""

    def __init__(self, router: Router, args: GatewayArgs, fetcher: Fetcher) -> None:
        self.orders = Orders(router, args)
        self.limits = args.limits
        self.fetcher = fetcher

    def routes(self) -> APIRouter:
        """The body is read here, within limits and with our own errors."""
        pictures = {name: {"schema": {"type": "string", "format": "binary"}} for name in FORMATS}
        routes = APIRouter(tags=["hugging face"])
        body = {"required": True, "content": {"application/json": {"schema": body_schema()}}}
        routes.add_api_route(
            HUB + "{model:path}",
            self.draw,
            methods=["POST"],
            response_class=Response,
            responses={200: {"content": pictures}, "default": {"model": HubFailure}},
            openapi_extra={"requestBody": body, "parameters": PARAMETERS},
        )
        return routes

    async def draw(self, request: Request, model: str) -> Response:
        """One picture as its bytes; what was not heeded is in `x-flux-warnings`."""
        fields, unknown, order = await self.read(request, model)
        result = await self.orders.draw(order)
        drawn = order.request_of(result)
        warnings = [*warnings_of(fields, result), *unknown]
        headers = {"x-flux-model": result.tier, "x-flux-seed": str(drawn.seed)}
        headers |= self.orders.limit_headers(order)
        if warnings:
            # Names that a client made up are among them; a header is ASCII.
            text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
            headers["x-flux-warnings"] = text[:MAX_HEADER_CHARS]
        media_type = f"image/{drawn.encoding.format}"
        return Response(result.images[0].data, media_type=media_type, headers=headers)

    async def read(self, request: Request, model: str) -> tuple[ImageFields, list[str], Order]:
        """What the body asks for, what of it nobody knows, and its order; it is not kept itself."""
        target = self.orders.target_of(request, model)
        sent = parse_inputs(await read_body(request))
        fields = fields_of(sent, format_of(request))
        references = await self.references_of(sent, target)
        order = await self.orders.take(
            request, target, lambda tier: request_for(fields, tier, self.limits, references)
        )
        forget_body(request)
        return fields, unknown_in(sent), order

    async def references_of(self, sent: Inputs, target: Target) -> tuple[SentImage, ...]:
        """The picture to edit, if there is one."""
        if sent.wish.prompt is None:
            return ()
        if not target.max_references:
            raise BadReference(f"{target.name} takes no pictures", "inputs")
        sources = Sources([Source("inputs", sent.inputs)])
        return (await read_pictures(sources, target, self.limits, self.fetcher)).references


def body_schema() -> dict[str, Any]:
    """What OpenAPI says of the body, in one piece."""
    schema = Inputs.model_json_schema()
    parts = schema.pop("$defs")
    parameters = parts["Parameters"]
    fields = ImageFields.model_json_schema()["properties"].items()
    parameters["properties"] |= {name: each for name, each in fields if name not in NOT_HERE}
    parameters["properties"]["target_size"] = parts["TargetSize"]
    schema["properties"]["parameters"] = {"anyOf": [parameters, {"type": "null"}]}
    return schema


def parse_inputs(body: bytes) -> Inputs:
    """The checked body."""
    check_json(body)
    try:
        sent = Inputs.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(error) from None
    inside = {name for name in said_in(sent.wish) if name in REFERENCE_FIELDS}
    for name in sorted(inside | (said_in(sent) & PICTURE_FIELDS)):
        raise BadReference("a picture is sent as inputs, and its words as parameters.prompt", name)
    if sent.wish.prompt is None and is_picture(sent.inputs):
        raise BadRequest("what to do with the picture is to be said in parameters.prompt", "prompt")
    return sent


def said_in(sent: Inputs | Parameters) -> set[str]:
    """The other fields that say anything."""
    return {name for name, each in (sent.model_extra or {}).items() if each not in (None, "", [])}


def unknown_in(sent: Inputs) -> list[str]:
    """What nobody looked at, beside the parameters."""
    names = sorted(said_in(sent) - {OPTIONS})[:MAX_NAMED_FIELDS]
    return [f"unknown field {name[:80]!r} was ignored" for name in names]


def fields_of(sent: Inputs, output_format: ImageFormat) -> ImageFields:
    """The same wish in the words of OpenAI's routes, whose checks then hold here too."""
    extra: dict[str, Any] = dict(sent.wish.model_extra or {})
    for name in NOT_HERE & extra.keys():
        raise BadRequest(f"{name} is not for this route", name)
    if sent.wish.target_size is not None:
        extra |= sent.wish.target_size.model_dump()
    if sent.wish.prompt is None:
        # Each side may be sent alone: that is a square, where there is no picture to be like.
        sides = [extra[name] for name in ("width", "height") if extra.get(name) is not None]
        extra |= dict.fromkeys(("width", "height"), sides[0]) if len(sides) == 1 else {}
    prompt = sent.inputs if sent.wish.prompt is None else sent.wish.prompt
    try:
        fields = ImageFields.model_validate(
            {"output_format": output_format} | extra | {"prompt": prompt}
        )
    except ValidationError as error:
        raise bad_request(error) from None
    check_supported(fields)
    return fields


def format_of(request: Request) -> ImageFormat:
    """What the client accepts; PNG where that is nothing in particular."""
    accepted = (
        part.partition(";")[0].strip() for part in request.headers.get("accept", "").split(",")
    )
    return next((FORMATS[name] for name in accepted if name in FORMATS), "png")
