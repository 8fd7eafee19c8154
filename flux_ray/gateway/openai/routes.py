"""OpenAI's image routes: `/v1/images/generations` and `/v1/images/edits`."""

import time
from functools import cache
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.config import GatewayArgs
from flux_ray.errors import BadReference, BadRequest, WrongContentType
from flux_ray.gateway.callers import PARAMETER, PARAMETERS
from flux_ray.gateway.errors import Envelope
from flux_ray.gateway.http import MEDIA_TYPE, forget_body, read_body
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.images.masks import decode_erased
from flux_ray.gateway.images.sources import ImageSources, RequestImages, read_images
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.gateway.openai.answer import Answer, Kind, answer_for, stream
from flux_ray.gateway.openai.fields import ImageFields, fields_schema, parse_json, warnings_of
from flux_ray.gateway.openai.references import (
    CONTROL_NAMES,
    MASK_NAMES,
    REFERENCE_NAMES,
    open_form,
    sources_in_form,
    take_sources,
    text_parts,
)
from flux_ray.gateway.openai.request import request_for
from flux_ray.gateway.results import KeptImages
from flux_ray.gateway.submit import PreparedRequest, Submitter
from flux_ray.gateway.upsampling.rewriting import PromptRewriter
from flux_ray.router.router import Router

JSON = "application/json"
FORM = "multipart/form-data"
# Aliases of OpenAI's models of that name answer by URL by default, as OpenAI does: their clients
# expect it.
URL_MODELS = "dall-e-"
# Under that name an image without a mask is edited where it is transparent, as OpenAI does.
ALPHA_MODELS = "dall-e-2"
EVENTS = {
    "type": "object",
    "description": "with `stream`: previews, where asked for or of a cascade, and the images",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}


class OpenAIImages:
    """The endpoints of both routes at one gateway.

    `kept` stores the images of answers by URL; None if the gateway keeps no images.
    """

    def __init__(
        self,
        router: Router,
        args: GatewayArgs,
        fetcher: Fetcher,
        kept: KeptImages | None,
        rewriter: PromptRewriter | None = None,
    ) -> None:
        self.submitter = Submitter(router, args, rewriter)
        self.limits = args.limits
        self.fetcher = fetcher
        self.kept = kept

    def routes(self) -> APIRouter:
        """Return a router with both routes.

        The endpoints read bodies themselves, not FastAPI: within limits, and with our errors.
        """
        routes = APIRouter(
            tags=["images"],
            responses={
                200: {"model": Answer, "content": {MEDIA_TYPE: {"schema": EVENTS}}},
                "default": {"model": Envelope},
            },
        )
        for path, endpoint, body in (
            ("/v1/images/generations", self.generations, body_schema(JSON)),
            ("/v1/images/edits", self.edits, body_schema(FORM, JSON)),
        ):
            extra = body | {"parameters": [*PARAMETERS, PARAMETER]}
            routes.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra)
        return routes

    async def generations(self, request: Request) -> Response:
        """Generate images from a prompt, and from reference images if some are sent."""
        started_s = time.monotonic()
        content_type_of(request, JSON)
        fields, prepared = await self.read_json(request)
        return await self.generate(request, fields, prepared, started_s)

    async def edits(self, request: Request) -> Response:
        """Generate images from a prompt and one or more reference images."""
        started_s = time.monotonic()
        if content_type_of(request, FORM, JSON) == JSON:
            fields, prepared = await self.read_json(request, is_edit=True)
        else:
            fields, prepared = await self.read_form(request)
        return await self.generate(request, fields, prepared, started_s)

    async def read_json(
        self, request: Request, *, is_edit: bool = False
    ) -> tuple[ImageFields, PreparedRequest]:
        """Read a JSON body, and prepare its request; free the memory of the body."""
        fields = parse_json(await read_body(request))
        target = self.target_of(request, fields)
        sources = take_sources(fields.model_extra or {}, target)
        prepared = await self.prepare(
            request, fields, target, required(sources) if is_edit else sources
        )
        forget_body(request)
        return fields, prepared

    async def read_form(self, request: Request) -> tuple[ImageFields, PreparedRequest]:
        """Read a multipart form, and prepare its request; free the memory of the body."""
        async with open_form(request, self.limits) as form:
            fields = ImageFields.read(text_parts(form), has_images=True)
            target = self.target_of(request, fields)
            sources = sources_in_form(form, target)
            prepared = await self.prepare(request, fields, target, required(sources))
        forget_body(request)
        return fields, prepared

    def target_of(self, request: Request, fields: ImageFields) -> ResolvedModel:
        """Return the tiers that may serve the request.

        Raises BadRequest if it asks for URLs and this gateway keeps no images.
        """
        if fields.response_format == "url" and self.kept is None:
            message = "this gateway keeps no images to answer by URL: use b64_json"
            raise BadRequest(message, "response_format")
        return self.submitter.target_of(request, fields.model)

    async def read_images(
        self, fields: ImageFields, target: ResolvedModel, sources: ImageSources
    ) -> RequestImages:
        """Read and decode the images within this gateway's limits."""
        has_alpha = (fields.model or "").startswith(ALPHA_MODELS)
        read_erased = decode_erased if has_alpha else None
        return await read_images(
            sources, target, self.limits, self.fetcher, read_erased=read_erased
        )

    async def prepare(
        self, http: Request, fields: ImageFields, target: ResolvedModel, sources: ImageSources
    ) -> PreparedRequest:
        """Read the images, and prepare the request for each tier that can do it."""
        images = await self.read_images(fields, target, sources)
        return await self.submitter.take(
            http,
            target,
            lambda tier: request_for(fields, tier, self.limits, images, target.served),
            images.notes,
        )

    async def generate(
        self, http: Request, fields: ImageFields, prepared: PreparedRequest, started_s: float
    ) -> Response:
        """Generate the images of a prepared request, and answer whole or as a stream."""
        # Not before the body is forgotten: an LLM may take seconds.
        prepared = await self.submitter.complete(http, prepared, fields.seed, fields.upsampling)
        if fields.stream:
            is_edit = http.scope["path"].endswith("edits")
            kind: Kind = "image_edit" if is_edit else "image_generation"
            streamed = await stream(self.submitter, prepared, fields, kind)
            streamed.headers.update(self.submitter.limit_headers(prepared))
            return streamed
        result = await self.submitter.generate(prepared)
        generated = prepared.request_of(result)
        warnings = [*warnings_of(fields, generated, result), *prepared.notes_on(result)]
        urls = None
        if self.kept is not None and wants_url(fields):
            urls = await self.kept.urls_of(prepared.caller.key, generated, result)
        answer = answer_for(generated, result, warnings, started_s, urls, prepared.rewriting)
        answer.headers.update(self.submitter.limit_headers(prepared))
        return answer


def wants_url(fields: ImageFields) -> bool:
    """Return whether the client wants URLs: by `response_format`, else by the model's name."""
    if fields.response_format is None:
        return (fields.model or "").startswith(URL_MODELS)
    return fields.response_format == "url"


def required(sources: ImageSources) -> ImageSources:
    """Return the sources of an edit. Raises BadReference if there is no image."""
    if not sources.references:
        raise BadReference("image is required", "image")
    return sources


def content_type_of(request: Request, *readable: str) -> str:
    """Return the content type of the body. Raises WrongContentType unless it is `readable`."""
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent not in readable:
        told = f", which says that it is {sent[:80]}" if sent else ""
        raise WrongContentType(f"send the body{told}, as {' or '.join(readable)}")
    return sent


@cache
def body_schema(*content_types: str) -> dict[str, Any]:
    """Return the description of a body for OpenAPI."""
    texts = {"description": "base64, with or without a data prefix, or a URL; or a list of them"}
    mask = {
        "description": "the part of the first image to generate, as large as that: fully"
        " transparent pixels, or white ones where none is transparent; the rest stays. `mask_image`"
        " is the same"
    }
    control = {
        "description": "edges or depths that the image follows, for models that take them: base64"
        " or a URL, or a file. Nothing is computed from a photograph"
    }
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    content = {}
    for content_type in content_types:
        schema = fields_schema()
        schema["properties"] |= {name: texts for name in REFERENCE_NAMES}
        schema["properties"] |= dict.fromkeys(MASK_NAMES, mask)
        schema["properties"] |= dict.fromkeys(CONTROL_NAMES, control)
        if content_type == FORM:
            schema["properties"] |= {"image": files, "image[]": files}
        if FORM in content_types:
            names = (*REFERENCE_NAMES, *CONTROL_NAMES)
            schema["anyOf"] = [{"required": [name]} for name in names]
        content[content_type] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}
