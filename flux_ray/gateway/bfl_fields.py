"""The fields of BFL's routes: one model for all of them, as clients mix those of several."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flux_ray.errors import BadRequest
from flux_ray.gateway.openai_fields import MAX_SEED, bad_request, check_json

IMAGES = ("input_image", *(f"input_image_{number}" for number in range(2, 9)))
MAY_BE_EMPTY = {*IMAGES, "image", "mask", "aspect_ratio", "webhook_url", "webhook_secret"}
MIN_SIDE = 64
# Of the documentation: 4 MP in all, sides between 1:4 and 4:1.
MAX_PIXELS = 4 * 1024 * 1024
MAX_RATIO = 4.0
PICTURE = "base64, with or without a data prefix, or a URL"
# Without them the caller would get another picture than asked.
UNSERVED = {
    "image_prompt": "pictures as prompts are not served: send input_image",
    "images": "send input_image, input_image_2 and so on",
    "image_url": "send input_image",
    **{f"input_image_{number}": "there are eight input images at most" for number in range(9, 17)},
    "control_image": "control images are not served",
    "preprocessed_image": "control images are not served",
    "top": "expanding is not served",
    "bottom": "expanding is not served",
    "left": "expanding is not served",
    "right": "expanding is not served",
    "finetune_id": "finetunes are not served",
    "input_image_blob_path": "paths on the server are not read",
}
# What is asked for in vain, with the values that ask for nothing.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "safety_tolerance": (),
    "prompt_upsampling": (False,),
    "raw": (False,),
    "disable_pup": (False, True),
    "image_prompt_strength": (),
    "finetune_strength": (),
}

# As OpenAI has them.
MetadataName = Annotated[str, Field(min_length=1, max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class BflFields(BaseModel):
    """What a client may send; unknown fields are named in the answer."""

    model_config = ConfigDict(extra="allow", frozen=True, title="BflFields")

    prompt: str = Field("", description="may be empty where `image` is filled")
    input_image: str | None = Field(None, description=PICTURE)
    input_image_2: str | None = Field(None, description=PICTURE)
    input_image_3: str | None = Field(None, description=PICTURE)
    input_image_4: str | None = Field(None, description=PICTURE)
    input_image_5: str | None = Field(None, description=PICTURE)
    input_image_6: str | None = Field(None, description=PICTURE)
    input_image_7: str | None = Field(None, description=PICTURE)
    input_image_8: str | None = Field(None, description=PICTURE)
    image: str | None = Field(None, description=f"to fill: {PICTURE}")
    mask: str | None = Field(
        None, description="of the first picture, white where it is drawn; or `image` has an alpha"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="drawn and returned if absent")
    width: int | None = Field(None, ge=0, le=16_384, description="0 is as none")
    height: int | None = Field(None, ge=0, le=16_384, description="0 is as none")
    aspect_ratio: str | None = Field(None, description="`auto` or W:H, where there are no pixels")
    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    safety_tolerance: int | None = Field(None, ge=0, le=6, description="has no effect")
    prompt_upsampling: bool | None = Field(None, description="has no effect")
    raw: bool | None = Field(None, description="has no effect")
    output_format: Literal["jpeg", "png", "webp"] | None = None
    webhook_url: str | None = Field(
        None, max_length=2083, description="https, where the end is told of"
    )
    webhook_secret: str | None = Field(
        None, max_length=1024, description="what that is signed with"
    )
    metadata: dict[MetadataName, MetadataText] | None = Field(
        None, max_length=16, description="the caller's own: comes back with the job"
    )

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, sent: Any) -> Any:
        """A null says as much as no field, and so does an empty text where any text may stand."""
        if not isinstance(sent, dict):
            return sent
        return {
            name: each
            for name, each in sent.items()
            if each is not None and (each != "" or name not in MAY_BE_EMPTY)
        }

    @property
    def unknown(self) -> list[str]:
        """The fields that nobody here has heard of."""
        return sorted((self.model_extra or {}).keys() - UNSERVED.keys() - NO_EFFECT.keys())

    @property
    def asked_in_vain(self) -> list[str]:
        """The fields that change nothing here, of those that were sent."""
        sent = self.model_dump(exclude_unset=True)
        return [n for n, idle in NO_EFFECT.items() if n in sent and sent[n] not in idle]


def parse_body(body: bytes) -> BflFields:
    """The checked fields of a JSON body."""
    check_json(body)
    try:
        fields = BflFields.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(error) from None
    if fields.image is None and not fields.prompt.strip():
        raise BadRequest("prompt is empty", "prompt")
    for name, reason in UNSERVED.items():
        # Some clients send every field that they know.
        if (fields.model_extra or {}).get(name) not in (None, "", 0, False, []):
            raise BadRequest(reason, name)
    return fields
