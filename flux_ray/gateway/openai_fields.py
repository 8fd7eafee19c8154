"""The fields of OpenAI's image routes, and what other servers of that dialect add to them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flux_ray.errors import BadRequest

# As torch has it, and clients that draw one.
MAX_SEED = 2**64 - 1
MAX_JSON_VALUES = 100_000
# One field each, under the names that other servers give it.
STEPS = ("num_inference_steps", "steps", "step")
GUIDANCE = ("guidance_scale", "guidance")

Steps = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class ImageFields(BaseModel):
    """What a client may send besides pictures; unknown fields are named in the answer."""

    model_config = ConfigDict(extra="allow", frozen=True, title="ImageFields")

    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = Field(None, description="`auto` or WIDTHxHEIGHT")
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="drawn and returned if absent")
    num_inference_steps: Steps | None = None
    steps: Steps | None = Field(None, description="`num_inference_steps`")
    step: Steps | None = Field(None, description="`num_inference_steps`")
    guidance_scale: Guidance | None = None
    guidance: Guidance | None = Field(None, description="`guidance_scale`")
    negative_prompt: str | None = None
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`url` where the gateway keeps pictures"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp"
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` is not supported"
    )
    stream: bool | None = Field(
        None, description="server-sent events; previews where the model is a cascade"
    )
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with `stream`: previews of each picture while it is drawn"
    )
    quality: str | None = Field(
        None,
        description="`low`, `medium`, `high` and so on: steps, on tiers that are not distilled",
    )
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, sent: Any) -> Any:
        """A null says as much as no field, unknown fields' too."""
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    def sent_as(self, names: tuple[str, ...]) -> str | None:
        """The first of a field's names under which it was sent."""
        return next((name for name in names if getattr(self, name) is not None), None)


def check_json(body: bytes) -> None:
    """Raises for a body of many small values: each becomes an object, a hundred times its bytes.

    Pictures in base64 have none of these signs, and a prompt is short.
    """
    if sum(body.count(sign) for sign in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise BadRequest("the body has too many values")


def parse_json(body: bytes) -> ImageFields:
    """The fields of a JSON body."""
    check_json(body)
    try:
        fields = ImageFields.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise bad_request(error) from None
    check_supported(fields)
    return fields


def parse_text(parts: dict[str, str]) -> ImageFields:
    """The fields of a form, where every value is text."""
    try:
        fields = ImageFields.model_validate_strings(parts)
    except ValidationError as error:
        raise bad_request(error) from None
    check_supported(fields)
    return fields


def bad_request(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, in words for the caller."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return BadRequest(f"{field} is required", field)
    if first["type"] == "json_invalid":
        return BadRequest("the body is not valid JSON")
    if field is None:
        return BadRequest("the body must be a JSON object")
    return BadRequest(f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}", field)


def check_supported(fields: ImageFields) -> None:
    """Raises for what would change the answer and is not there yet."""
    if not fields.prompt.strip():
        raise BadRequest("prompt is empty", "prompt")
    for names in (STEPS, GUIDANCE):
        check_same(fields, names)
    if fields.background == "transparent":
        raise BadRequest("transparent backgrounds are not supported", "background")


def check_same(fields: ImageFields, names: tuple[str, ...]) -> None:
    """Raises if a field was sent under two names, with two values."""
    sent = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    if len(set(sent.values())) > 1:
        raise BadRequest(f"{' and '.join(sent)} disagree", next(iter(sent)))
