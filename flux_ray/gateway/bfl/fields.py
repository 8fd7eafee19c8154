"""The fields of BFL's routes, in one model for all of them: clients mix those of several routes."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.foreign import (
    NO_EFFECT,
    REFUSED,
    SILENT,
    check_served,
    has_pixels,
    is_nothing,
)
from flux_ray.gateway.fields.sent import check_same, comparable, heed, parse_object
from flux_ray.gateway.fields.sizes import parse_size
from flux_ray.gateway.openai.fields import (
    MAX_SEED,
    Format,
    Guidance,
    Number,
    Whole,
    bad_request,
    with_texts,
)
from flux_ray.gateway.openai.references import unwrapped
from flux_ray.gateway.upsampling.rewriting import UpsamplingWish

# Our names on OpenAI's routes, and BFL's for the same fields.
RENAMED = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
MIN_SIDE = 64
# BFL's documented limit, 4 MP.
MAX_PIXELS = 4 * 1024 * 1024
OURS = "not BFL's: as on `/v1/images/generations`"
IMAGE = "base64, with or without a data prefix, or a URL"
# Fields without effect and their values that need no warning: they ask for what is done anyway.
IDLE: dict[str, tuple[Any, ...]] = {
    "raw": (False,),
    "disable_pup": (False, True),
    "version": ("latest",),
}
NO_EFFECT_HERE = NO_EFFECT | IDLE.keys() | {"grounding", "finetune_strength"}

# OpenAI's limits for metadata; BFL has none of its own.
MetadataName = Annotated[str, Field(min_length=1, max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class BflFields(BaseModel):
    """The fields that a client may send; unknown ones are named in a warning of the answer."""

    model_config = ConfigDict(extra="allow", frozen=True, title="BflFields")

    prompt: str = Field("", description="may be empty where `image` is filled")
    image: Any = Field(None, description=f"to fill: {IMAGE}")
    seed: Whole | None = Field(
        None, ge=0, le=MAX_SEED, description="chosen at random and returned if absent or -1"
    )
    width: Whole | None = Field(None, ge=0, le=16_384, description="0 is as none")
    height: Whole | None = Field(None, ge=0, le=16_384, description="0 is as none")
    aspect_ratio: str | None = Field(None, description="`auto` or W:H, where there are no pixels")
    resolution: str | None = Field(None, description="`1k`, `2k` and so on, where there are none")
    steps: Whole | None = Field(None, ge=1)
    guidance: Guidance | None = None
    negative_prompt: str | None = Field(None, description=OURS)
    true_cfg_scale: Guidance | None = Field(None, description=OURS)
    strength: Number | None = Field(None, description=OURS)
    allow_truncation: bool | None = Field(None, description=OURS)
    safety_tolerance: Whole | None = Field(None, ge=0, le=7, description="has no effect")
    prompt_upsampling: bool | None = Field(
        None, description="have an LLM make the prompt more detailed"
    )
    raw: bool | None = Field(None, description="has no effect")
    output_format: Format | None = None
    webhook_url: str | None = Field(
        None, max_length=2083, description="https, where the end is told of"
    )
    webhook_secret: str | None = Field(
        None, max_length=1024, description="what that is signed with"
    )
    metadata: dict[MetadataName, MetadataText] | None = Field(
        None, max_length=16, description="the caller's own: comes back with the job"
    )
    _names: dict[str, str] = PrivateAttr(default_factory=dict)

    def named(self, field: str) -> str:
        """Return the name by which the caller sent a field."""
        return self._names.get(field, field)

    @property
    def upsampling(self) -> UpsamplingWish:
        """Return whether the caller wants its prompt upsampled; `disable_pup` is a no."""
        if self.prompt_upsampling is None and self.others.get("disable_pup") is True:
            return UpsamplingWish(False, self.named("disable_pup"))
        return UpsamplingWish(self.prompt_upsampling, self.named("prompt_upsampling"))

    @property
    def others(self) -> dict[str, Any]:
        """Return the fields that are not declared here: references, masks, and unserved ones."""
        return self.model_extra or {}

    @property
    def unknown(self) -> list[str]:
        """Return the sent names that no API in `gateway/fields/foreign.py` has."""
        known = NO_EFFECT_HERE | SILENT | REFUSED.keys()
        return sorted(
            self.named(name) for name in self.others.keys() - known if not has_pixels(name)
        )

    @property
    def asked_in_vain(self) -> list[str]:
        """Return the sent fields that have no effect and ask for something else than is done."""
        sent = self.model_dump(exclude_unset=True)
        return [
            self.named(name)
            for name in sent
            if name in NO_EFFECT_HERE | {"safety_tolerance"}
            and sent[name] not in IDLE.get(name, ())
            and not (name in NO_EFFECT and name not in IDLE and is_nothing(sent[name]))
        ]


def parse_body(body: bytes) -> BflFields:
    """Read and check the fields of a JSON body. Raises BadRequest."""
    values, names = heed(parse_object(body))
    for name, here in RENAMED.items():
        if name in values:
            values[here], names[here] = values.pop(name), names.pop(name, name)
    check_one(values, names)
    spread_size(values, names)
    if "image" in values and not any(unwrapped("image", values["image"])):
        # An empty list is as none: there is nothing to fill.
        del values["image"]
    try:
        fields = BflFields.model_validate(values)
    except ValidationError as error:
        raise bad_request(error, names) from None
    fields._names.update(names)
    if fields.image is None and not fields.prompt.strip():
        name = fields.named("prompt")
        raise BadRequest(f"{name} is empty", name)
    check_served(fields.others, fields.named, has_images=fields.image is not None)
    return fields


def check_one(values: dict[str, Any], names: Mapping[str, str]) -> None:
    """Remove the number of images; raise BadRequest unless it is 1, as a job has one image."""
    number = values.pop("n", None)
    if number is not None and (isinstance(number, bool) or str(number) not in ("1", "1.0")):
        name = names.get("n", "n")
        raise BadRequest(f"{name}: one job is one image", name)


def spread_size(values: dict[str, Any], names: dict[str, str]) -> None:
    """Replace OpenAI's `size` by width and height. BadRequest if those were sent and disagree."""
    if "size" not in values:
        return
    name = names.get("size", "size")
    sides = parse_size(str(values.pop("size"))[:80], name)
    for field, pixels in zip(("width", "height"), sides, strict=True):
        if comparable(values.get(field)) in (None, 0):
            values[field], names[field] = pixels, name
        else:
            check_same(values, field, pixels, (names.get(field, field), name))


@cache
def fields_schema() -> dict[str, Any]:
    """Return the JSON schema of the fields, for OpenAPI."""
    schema = BflFields.model_json_schema()
    schema["properties"] = with_texts(schema["properties"])
    images = ("input_image", *(f"input_image_{number}" for number in range(2, 9)), "images", "mask")
    schema["properties"] |= {name: {"description": f"{IMAGE}; or a list"} for name in images}
    schema["properties"]["image_prompt"] = {"description": f"a reference, {IMAGE}"}
    schema["properties"] |= {
        "control_image": {"description": f"edges or depths, {IMAGE}; none are computed from it"},
        "preprocessed_image": {"description": f"the same, {IMAGE}"},
    }
    schema["properties"]["mask"] = {
        "description": "of the first image, white where it is generated; or `image` has an alpha"
    }
    return schema
