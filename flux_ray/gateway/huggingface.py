"""Serve Hugging Face's raw endpoint, `POST /models/{model}`: a prompt or an image in, an image out.

Its fields become those of OpenAI's routes, so that the same checks hold for both.
"""

from functools import cache
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.config import GatewayArgs
from flux_ray.errors import BadReference, BadRequest, WrongContentType
from flux_ray.gateway.callers import PARAMETER, PARAMETERS
from flux_ray.gateway.errors import HUB, HubFailure
from flux_ray.gateway.fields.foreign import (
    is_control_name,
    is_image_name,
    is_mask_name,
)
from flux_ray.gateway.fields.sent import SentFields, heed, parse_object, replace_by
from flux_ray.gateway.http import forget_body, read_body
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.images.masks import decode_painted_mask
from flux_ray.gateway.images.sources import ImageSource, RequestImages, is_image, read_images
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.gateway.openai.fields import (
    ImageFields,
    Whole,
    bad_request,
    check_supported,
    fields_schema,
    warnings_of,
)
from flux_ray.gateway.openai.references import (
    CONTROL_NAMES,
    MASK_NAMES,
    checked,
    is_image_part,
    named_in,
)
from flux_ray.gateway.openai.request import request_for
from flux_ray.gateway.submit import PreparedRequest, Submitter
from flux_ray.gateway.upsampling.rewriting import PromptRewriter, Rewriting
from flux_ray.request import ImageFormat
from flux_ray.router.router import Router

FORMATS: dict[str, ImageFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}
ANY_FORMAT = ("image/*", "*/*")
# Content types that carry JSON: curl and older examples of Hugging Face's do not declare it.
AS_JSON = ("", "application/json", "application/x-www-form-urlencoded", "text/plain")
# Fields of OpenAI's routes that this route refuses: it has only one way to do each.
NOT_HERE = {"model", "response_format", "stream"}
# The old API's field for how to wait; ignored, since clients cannot choose that here.
OPTIONS = "options"
# Proxies and clients refuse longer headers.
MAX_HEADER_CHARS = 4096
REVISED_PROMPT = "x-flux-revised-prompt"
# What stays as it is in that header: visible ASCII and spaces, but for the sign of the encoding.
PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class TargetSize(BaseModel):
    """The size of the image, as `InferenceClient.image_to_image` sends it."""

    model_config = ConfigDict(extra="forbid")

    width: Whole = Field(ge=1)
    height: Whole = Field(ge=1)


class Parameters(BaseModel):
    """The client's parameters, under OpenAI's names where it has them.

    `prompt` is sent only if `inputs` is an image to edit.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    target_size: TargetSize | None = None


class Inputs(BaseModel):
    """The body: a prompt, or an image (base64 or a URL) with the prompt among the parameters."""

    model_config = ConfigDict(extra="allow")

    inputs: str
    parameters: Parameters | None = None

    @property
    def wish(self) -> Parameters:
        """Return the parameters, empty if none were sent."""
        return self.parameters or Parameters()


class HuggingFace:
    """The one route; `InferenceClient(model=f"{gateway}/models/tiny")` talks to it."""

    def __init__(
        self,
        router: Router,
        args: GatewayArgs,
        fetcher: Fetcher,
        rewriter: PromptRewriter | None = None,
    ) -> None:
        self.submitter = Submitter(router, args, rewriter)
        self.limits = args.limits
        self.fetcher = fetcher

    def routes(self) -> APIRouter:
        """Return the route. It reads the body itself, within the limits and with our own errors."""
        images = {name: {"schema": {"type": "string", "format": "binary"}} for name in FORMATS}
        routes = APIRouter(tags=["hugging face"])
        body = {"required": True, "content": {"application/json": {"schema": body_schema()}}}
        routes.add_api_route(
            HUB + "{model:path}",
            self.generate,
            methods=["POST"],
            response_class=Response,
            responses={200: {"content": images}, "default": {"model": HubFailure}},
            openapi_extra={"requestBody": body, "parameters": [*PARAMETERS, PARAMETER]},
        )
        return routes

    async def generate(self, request: Request, model: str) -> Response:
        """Return one image as a file; fields that had no effect are named in `x-flux-warnings`."""
        fields, prepared = await self.read(request, model)
        result = await self.submitter.generate(prepared)
        generated = prepared.request_of(result)
        warnings = [*warnings_of(fields, generated, result), *prepared.notes_on(result)]
        headers = {"x-flux-model": result.tier, "x-flux-seed": str(generated.seed)}
        headers |= self.submitter.limit_headers(prepared)
        headers |= headers_of(prepared.rewriting, result.tier)
        if prepared.rewriting.prompt_on(result.tier) and REVISED_PROMPT not in headers:
            warnings.append("the upsampled prompt is too long for a header")
        if warnings:
            # Field names that the client made up may be among them, and a header must be ASCII.
            text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
            headers["x-flux-warnings"] = text[:MAX_HEADER_CHARS]
        media_type = f"image/{generated.encoding.format}"
        return Response(result.images[0].data, media_type=media_type, headers=headers)

    async def read(self, request: Request, model: str) -> tuple[ImageFields, PreparedRequest]:
        """Return the fields of the body and the prepared request; the body itself is not kept."""
        check_content_type(request)
        target = self.submitter.target_of(request, model)
        sent, names = parse_inputs(await read_body(request))
        fields = fields_of(sent, names, format_of(request))
        images = await self.images_of(sent, target)
        prepared = await self.submitter.take(
            request,
            target,
            lambda tier: request_for(fields, tier, self.limits, images, target.served),
            images.notes,
        )
        # The images are decoded and counted by themselves from here on.
        forget_body(request)
        return fields, await self.submitter.complete(
            request, prepared, fields.seed, fields.upsampling
        )

    async def images_of(self, sent: Inputs, target: ResolvedModel) -> RequestImages:
        """Return the decoded images: the one to edit, its mask, and a control image, if sent."""
        extra = sent.wish.model_extra or {}
        references = [] if sent.wish.prompt is None else [ImageSource("inputs", sent.inputs)]
        masks, controls = (named_in(extra, kind) for kind in (is_mask_name, is_control_name))
        return await read_images(
            checked(target, iter(references), masks, controls),
            target,
            self.limits,
            self.fetcher,
            decode_painted_mask,
        )


def headers_of(rewriting: Rewriting, tier: str) -> dict[str, str]:
    """Return the headers of a prompt that was to be upsampled: its seconds, and its new words.

    A header must be ASCII, so other characters and `%` are percent-encoded as in URLs, and read
    back by any decoder of those. Words that are longer than a header may be are left out: half of
    them would not generate the image again.
    """
    headers = {}
    if rewriting.seconds is not None:
        headers["server-timing"] = f"upsample;dur={1000 * rewriting.seconds:.1f}"
    if (prompt := rewriting.prompt_on(tier)) is not None:
        written = quote(prompt, safe=PLAIN)
        headers |= {REVISED_PROMPT: written} if len(written) <= MAX_HEADER_CHARS else {}
    return headers


@cache
def body_schema() -> dict[str, Any]:
    """Return the body's JSON schema for OpenAPI; the image to edit is in `inputs`."""
    schema = Inputs.model_json_schema()
    parts = schema.pop("$defs")
    parameters = parts["Parameters"]
    fields = fields_schema()["properties"].items()
    parameters["properties"] |= {
        name: each for name, each in fields if name not in NOT_HERE | {"n", "num_images"}
    }
    parameters["properties"]["target_size"] = parts["TargetSize"]
    texts = {"description": "base64, with or without a data prefix, or a URL"}
    parameters["properties"] |= dict.fromkeys((*MASK_NAMES, *CONTROL_NAMES), texts)
    schema["properties"]["parameters"] = {"anyOf": [parameters, {"type": "null"}]}
    return schema


def check_content_type(request: Request) -> None:
    """Raise WrongContentType if the body cannot be JSON: some clients send an image as it is."""
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent not in AS_JSON and not sent.endswith("+json"):
        raise WrongContentType(
            f"the body is {sent[:80]}: send JSON, application/json, with the words as `inputs`,"
            " or an image in base64 as `inputs` and its words as `parameters.prompt`"
        )


def parse_inputs(body: bytes) -> tuple[Inputs, dict[str, str]]:
    """Return the checked body, and the caller's own names of translated parameters."""
    parts = {name: each for name, each in parse_object(body).items() if each is not None}
    parameters = parts.pop("parameters", None)
    names: dict[str, str] = {}
    if isinstance(parameters, dict | None):
        # Some clients put parameters beside `inputs` instead of into `parameters`.
        beside = {name: each for name, each in parts.items() if name not in ("inputs", OPTIONS)}
        parts = {name: each for name, each in parts.items() if name not in beside}
        parameters, names = joined(parameters or {}, beside)
    try:
        sent = Inputs.model_validate(parts | {"parameters": parameters})
    except ValidationError as error:
        raise bad_request(error) from None
    check_images(sent)
    return sent, names


def joined(
    parameters: dict[str, Any], beside: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate the parameters, wherever they stand. BadRequest if two of them disagree."""
    for name in parameters.keys() & beside.keys():
        if parameters[name] != beside[name]:
            raise BadRequest(f"{name[:80]} and parameters.{name[:80]} disagree", name[:80])
    values, names = heed(beside | parameters)
    number = values.pop("n", None)
    if number is not None and (isinstance(number, bool) or str(number) not in ("1", "1.0")):
        name = names.get("n", "n")
        raise BadRequest(f"{name} is not for this route: one request is one image", name)
    return SentFields(values, names)


def check_images(sent: Inputs) -> None:
    """Raise for images in fields where none is read, and for an image without a prompt."""
    for name, each in (sent.wish.model_extra or {}).items():
        if each == {} or (isinstance(each, list) and not any(each)):
            continue
        if is_image_name(name):
            message = "an image is sent as inputs, and its words as parameters.prompt"
            raise BadReference(message, name)
    if sent.wish.prompt is None and is_image(sent.inputs):
        raise BadRequest("what to do with the image is to be said in parameters.prompt", "prompt")


def fields_of(sent: Inputs, names: dict[str, str], output_format: ImageFormat) -> ImageFields:
    """Return the same wish in the fields of OpenAI's routes, whose checks then apply here, too."""
    extra: dict[str, Any] = {
        name: each
        for name, each in (sent.wish.model_extra or {}).items()
        if not is_image_part(name)
    }
    for name in NOT_HERE & extra.keys():
        raise BadRequest(f"{name} is not for this route", name)
    if sent.wish.target_size is not None:
        extra["target_size"] = sent.wish.target_size
        replace_by(extra, names, "target_size", sent.wish.target_size.model_dump())
    prompt = sent.wish.prompt
    if prompt is None:
        square(extra, names)
        prompt, names["prompt"] = sent.inputs, "inputs"
    fields = ImageFields.of({"output_format": output_format} | extra | {"prompt": prompt}, names)
    check_supported(fields, has_images=sent.wish.prompt is not None)
    return fields


def square(extra: dict[str, Any], names: dict[str, str]) -> None:
    """Add the side that is missing: without an image, there is no shape that could be kept."""
    for sent, missing in (("width", "height"), ("height", "width")):
        if sent in extra and missing not in extra:
            extra[missing], names[missing] = extra[sent], names.get(sent, sent)
            return


def format_of(request: Request) -> ImageFormat:
    """Return the image format that the client's `Accept` prefers; PNG if it prefers none."""
    weights: dict[str, float] = {}
    for part in request.headers.get("accept", "").lower().split(","):
        name, _, options = part.partition(";")
        weights.setdefault(name.strip().replace("image/jpg", "image/jpeg"), weight_of(options))
    rest = next((weights[name] for name in ANY_FORMAT if name in weights), 0.0)
    named = [name for name in weights if name in FORMATS]
    # Formats that are named come first, so that max() prefers them to `*/*` of equal weight.
    liked = [*((weights[name], name) for name in named)]
    liked += [(rest, name) for name in FORMATS if name not in weights]
    weight, best = max(liked, key=lambda each: each[0])
    return FORMATS[best] if weight > 0 else "png"


def weight_of(options: str) -> float:
    """Return the weight in `q=0.5`, clamped to 0..1; 1 if there is none to be read."""
    for option in options.split(";"):
        name, _, value = option.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 1.0
    return 1.0
