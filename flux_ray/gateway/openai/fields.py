"""The fields of OpenAI's image routes, with those that other servers of that API add to them.

`ImageFields` checks types and limits. A field that is sent and has no effect is never dropped in
silence: `warnings_of` names it in the answer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from flux_ray.catalog import Tier, tier_for
from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.foreign import (
    NO_EFFECT,
    REFUSED,
    SILENT,
    check_served,
    has_pixels,
    is_nothing,
)
from flux_ray.gateway.fields.sent import heed, parse_object
from flux_ray.gateway.fields.sizes import side_of
from flux_ray.gateway.heeded import heeds
from flux_ray.gateway.upsampling.rewriting import UpsamplingWish
from flux_ray.request import Finished, ImageRequest, ImageResult, Preview

# The largest seed of torch, and of clients that choose one at random.
MAX_SEED = 2**64 - 1
AS_TEXT: dict[str, Any] = {"type": "string", "description": "the same as text"}


def no_truth(value: Any) -> Any:
    """Return the value; raise for true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a valid integer or number")
    return value


# Numbers of JSON and of forms alike: 7, 7.0 or `7`, and 3.5 or `3.5`.
Whole = Annotated[int, BeforeValidator(no_truth)]
Number = Annotated[float, BeforeValidator(no_truth), Field(allow_inf_nan=False)]
Steps = Annotated[Whole, Field(ge=1)]
Guidance = Annotated[Number, Field(ge=0, le=100)]
Format = Literal["png", "jpeg", "webp"]


class ImageFields(BaseModel):
    """The fields that a client may send besides images; unknown ones are named in a warning."""

    model_config = ConfigDict(extra="allow", frozen=True, title="ImageFields")

    prompt: str
    model: str | None = None
    n: Whole | None = Field(None, ge=1, description="or `num_images`, `num_outputs` and so on")
    size: str | None = Field(None, description="`auto` or WIDTHxHEIGHT")
    width: Whole | None = Field(None, ge=1)
    height: Whole | None = Field(None, ge=1)
    aspect_ratio: str | None = Field(None, description="W:H, where no pixels are sent")
    resolution: str | None = Field(None, description="`1k`, `2k` or megapixels, like `1 MP`")
    seed: Whole | None = Field(
        None, ge=0, le=MAX_SEED, description="chosen at random and returned if absent or -1"
    )
    num_inference_steps: Steps | None = Field(None, description="or `steps`, or `step`")
    guidance_scale: Guidance | None = Field(None, description="or `guidance`, or `cfg_scale`")
    negative_prompt: str | None = Field(
        None,
        description="what to steer away from, at twice the price of a step",
        examples=["cars, people"],
    )
    true_cfg_scale: Guidance | None = Field(
        None,
        description="how far from `negative_prompt`, above 1; 4 if absent beside one",
        examples=[4.0],
    )
    strength: Number | None = Field(
        None,
        description="above 0, to 1: how much of the image is replaced by noise under a mask, by"
        " default all; or `denoising_strength`",
        examples=[0.6],
    )
    allow_truncation: bool | None = Field(
        None, description="cut a prompt that is JSON where the model stops reading"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`url` where the gateway keeps images"
    )
    output_format: Format | None = None
    output_compression: Whole | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp"
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` is not supported"
    )
    stream: bool | None = Field(
        None, description="server-sent events; previews where the model is a cascade"
    )
    partial_images: Whole | None = Field(
        None, ge=0, le=3, description="with `stream`: previews of each image while it is generated"
    )
    quality: str | None = Field(
        None,
        description="`low`, `medium`, `high` and so on: steps, on tiers that are not distilled",
    )
    prompt_upsampling: bool | None = Field(
        None, description="have an LLM make the prompt more detailed; also `enhance_prompt`"
    )
    user: str | None = None
    _names: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def read(cls, sent: Mapping[str, Any], *, has_images: bool = False) -> "ImageFields":
        """Read and check the fields that a client sent, under any name that other servers use.

        `has_images` says that images came beside these fields, as in a form. Raises BadRequest,
        which names fields as the client does.
        """
        values, names = heed(sent)
        fields = cls.of(values, names)
        check_supported(fields, has_images=has_images)
        return fields

    @classmethod
    def of(cls, values: Mapping[str, Any], names: Mapping[str, str]) -> "ImageFields":
        """Check types and limits of values under our names; `names` maps them to the client's.

        Raises BadRequest.
        """
        try:
            fields = cls.model_validate(dict(values))
        except ValidationError as error:
            raise bad_request(error, names) from None
        fields._names.update(names)
        return fields

    @property
    def has_size(self) -> bool:
        """Return whether the caller says anything of the size of the images."""
        wishes = (self.width, self.height, self.aspect_ratio, self.resolution)
        return self.size not in (None, "auto") or any(wish is not None for wish in wishes)

    def named(self, field: str) -> str:
        """Return the name by which the caller sent a field."""
        return self._names.get(field, field)

    @property
    def upsampling(self) -> UpsamplingWish:
        """Return whether the caller wants its prompt upsampled."""
        return UpsamplingWish(self.prompt_upsampling, self.named("prompt_upsampling"))


def parse_json(body: bytes) -> ImageFields:
    """Read and check the fields of a JSON body. Raises BadRequest."""
    return ImageFields.read(parse_object(body))


def bad_request(error: ValidationError, names: Mapping[str, str] | None = None) -> BadRequest:
    """Return the first error in words for the caller, with the field names that it used."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [each for each in first["loc"] if isinstance(each, str)]
    if not path:
        return BadRequest("the body must be a JSON object")
    path[0] = (names or {}).get(path[0], path[0])
    # Keys within metadata are the caller's own: the field that is wrong is metadata.
    where, field = ".".join(path), path[0 if path[0] == "metadata" else -1]
    if first["type"] == "missing":
        return BadRequest(f"{where} is required", field)
    reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        reason = "input should be an object"
    if first["type"] == "less_than_equal":
        # Pydantic's message rounds large limits, such as that of seeds.
        reason = f"input should be less than or equal to {first['ctx']['le']}"
    if path[-1] == "seed" and first["type"] == "greater_than_equal":
        reason += "; leave it out, or send -1, for any"
    return BadRequest(f"{where}: {reason}", field)


def check_supported(fields: ImageFields, *, has_images: bool = False) -> None:
    """Raise BadRequest for fields that would change the image and are not supported."""
    if not fields.prompt.strip():
        name = fields.named("prompt")
        raise BadRequest(f"{name} is empty", name)
    if fields.background == "transparent":
        raise BadRequest("transparent backgrounds are not supported", "background")
    check_served(fields.model_extra or {}, fields.named, has_images=has_images)


def fields_schema() -> dict[str, Any]:
    """Return the JSON schema of the fields, for OpenAPI, with the most usual other names."""
    schema = ImageFields.model_json_schema()
    schema["properties"] = with_texts(schema["properties"])
    for name, ours in (
        ("steps", "num_inference_steps"),
        ("step", "num_inference_steps"),
        ("guidance", "guidance_scale"),
        ("num_images", "n"),
    ):
        schema["properties"][name] = {"description": f"`{ours}`"}
    return schema


def with_texts(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a schema, with what is also read for each optional field.

    Every optional field may be text, as forms have nothing else, and empty text is none. A seed may
    be -1, and a boolean 1 or 0.
    """
    widened = {}
    for name, each in properties.items():
        if "anyOf" in each:
            further = [AS_TEXT]
            if name == "seed":
                further.append({"const": -1})
            if {"type": "boolean"} in each["anyOf"]:
                further.append({"enum": [0, 1]})
            each = each | {"anyOf": [*each["anyOf"], *further]}
        widened[name] = each
    return widened


MAX_NAMED_FIELDS = 20


def warnings_of(
    fields: ImageFields, request: ImageRequest, generated: ImageResult | Preview | Finished
) -> list[str]:
    """Return all warnings of an answer: those about the fields, then those of the replica.

    `request` is what was made of the fields for the tier that generated the answer.
    """
    said = generated.warnings if isinstance(generated, ImageResult) else ()
    return [*warnings_for(fields, request), *said]


def warnings_for(fields: ImageFields, request: ImageRequest) -> list[str]:
    """Return a warning for each field without effect on this request, by the caller's names."""
    extra, tier = fields.model_extra or {}, tier_for(request.tier)
    idle = [name for name in sorted(extra.keys() & NO_EFFECT) if not is_nothing(extra[name])]
    names = [fields.named(name) for name in [*unheeded(fields, tier, request), *idle]]
    warnings = [f"{name} has no effect on {tier.name}" for name in names]
    if fields.stream and fields.response_format == "url":
        warnings.append("response_format has no effect on a stream")
    if is_too_fine(fields, tier):
        name = fields.named("resolution")
        warnings.append(f"{name} is more than {tier.name} draws: the image is as large as it can")
    return warnings + unknown_warnings(fields)


def is_too_fine(fields: ImageFields, tier: Tier) -> bool:
    """Return whether `resolution` decides the size and has more pixels than the tier can do."""
    if fields.resolution is None or tier.scales_sizes:
        return False
    if fields.size is not None or fields.width is not None:
        return False
    return side_of(fields.resolution) ** 2 > tier.max_pixels


def unknown_warnings(fields: ImageFields) -> list[str]:
    """Return warnings for names that no API in `gateway/fields/foreign.py` has."""
    known = NO_EFFECT | SILENT | REFUSED.keys()
    unknown = sorted(
        fields.named(name)
        for name in (fields.model_extra or {}).keys() - known
        if not has_pixels(name)
    )
    return [f"unknown field {name[:80]!r} was ignored" for name in unknown[:MAX_NAMED_FIELDS]]


def unheeded(fields: ImageFields, tier: Tier, request: ImageRequest) -> list[str]:
    """Return the sent fields that have no effect on this tier or beside the other fields."""
    names = []
    if fields.guidance_scale is not None and not heeds(tier, "guidance_scale"):
        names.append("guidance_scale")
    if request.negative_prompt is None:
        # One of the two has no effect without the other.
        names += ["negative_prompt"] if (fields.negative_prompt or "").strip() else []
        names += ["true_cfg_scale"] if (fields.true_cfg_scale or 0) > 1 else []
    if fields.strength not in (None, 1) and request.mask is None:
        names.append("strength")
    is_preset = tier.steps_at(fields.quality) is not None and fields.num_inference_steps is None
    if fields.quality not in (None, "auto") and not is_preset:
        names.append("quality")
    if fields.output_compression is not None and fields.output_format in (None, "png"):
        names.append("output_compression")
    if fields.partial_images and not fields.stream:
        names.append("partial_images")
    return names
