"""Make an `ImageRequest` of OpenAI's fields: check them and fill in the tier's defaults."""

import secrets
import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from flux_ray.catalog import Tier
from flux_ray.config import Limits
from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.fields.sizes import (
    check_size,
    fitted,
    generated_size,
    lone_canvas,
    parse_size,
    ratio_of,
    shape_in,
    side_of,
    size_like,
)
from flux_ray.gateway.heeded import check_heeded, heeds
from flux_ray.gateway.images.decode import MAX_ASPECT, SentImage
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.openai.fields import MAX_SEED, ImageFields
from flux_ray.request import Encoding, ImageRequest, Mask

# Random seeds are below this, so that JavaScript clients read them exactly: it can up to 2**53.
GENERATED_SEEDS = 2**32
# The `true_cfg_scale` of a negative prompt that comes without one. At diffusers' own default for
# FLUX.1, 1, the prompt would have no effect; this is that of its other pipelines with both fields.
NEGATIVE_SCALE = 4.0


def request_for(
    fields: ImageFields,
    tier: Tier,
    limits: Limits,
    images: RequestImages,
    served: Collection[Tier] = (),
) -> ImageRequest:
    """Return the complete request for a tier, under a new id. Raises BadRequest, BadReference.

    Errors about a field that the tier does not heed name those of `served` that do.
    """
    check_limits(fields, limits)
    check_images(images, tier, served)
    asked, crop = asked_size(fields, tier, images)
    width, height = generated_size(*asked, tier)
    if images.mask is not None:
        check_masked_size(width, height, fields)
    encoding = encoding_for(fields, None if asked == (width, height) else asked)
    limit = tier.reference_limit(len(images.references))
    return ImageRequest(
        request_id=uuid.uuid4().hex,  # Not the client's: two clients may send the same one.
        tier=tier.name,
        prompt=fields.prompt,
        width=width,
        height=height,
        num_steps=steps_for(fields, tier),
        seed=seed_for(fields),
        num_images=fields.n or 1,
        references=tuple(each.raster_for(limit) for each in images.references),
        encoding=replace(encoding, cropped_to=crop),
        mask=images.mask,
        num_previews=(fields.partial_images or 0) if fields.stream else 0,
        strength=strength_for(fields, tier, images, served),
        follows_reference=images.is_control,
        allow_truncation=bool(fields.allow_truncation),
        **steering_for(fields, tier, served)._asdict(),
    )


def check_limits(fields: ImageFields, limits: Limits) -> None:
    """Raise BadRequest for longer prompts, or more images, than this gateway allows."""
    for field, words in (("prompt", fields.prompt), ("negative_prompt", fields.negative_prompt)):
        if len(words or "") > limits.max_prompt_chars:
            name = fields.named(field)
            raise BadRequest(f"{name} is longer than {limits.max_prompt_chars} characters", name)
    if (fields.n or 1) > limits.max_images:
        name = fields.named("n")
        raise BadRequest(f"{name} must be 1 to {limits.max_images}", name)


def check_images(images: RequestImages, tier: Tier, served: Collection[Tier]) -> None:
    """Raise BadRequest unless the tier can do with these images, and has all that it needs."""
    if images.is_control:
        check_heeded("control_image", (tier,), served)
    elif tier.takes_control:
        raise BadRequest(
            f"control_image is required: {tier.name} follows the edges or depths that it shows",
            "control_image",
        )
    elif len(images.references) > tier.max_references:
        check_heeded("image", (tier,), served)
        raise BadReference(f"{tier.name} takes at most {tier.max_references} images", "image")
    if images.mask is not None:
        check_mask(images.mask, images.references, tier, images.mask_name)
    elif tier.requires_mask:
        missing = "mask" if images.references else "image"
        raise BadRequest(
            f"{missing} is required: {tier.name} generates a part of an image, so send the image,"
            " and a mask that is white in that part",
            missing,
        )
    elif images.references and tier.masks_only:
        raise BadRequest(
            f"mask is required: {tier.name} takes an image only to generate a part of it", "mask"
        )


def check_mask(mask: Mask, references: tuple[SentImage, ...], tier: Tier, name: str) -> None:
    """Raise BadRequest unless the tier takes masks and the first image has the mask's size.

    `name`: the field in which the mask was sent.
    """
    if not tier.takes_mask:
        raise BadRequest(f"{tier.name} takes no masks", name)
    if not references:
        raise BadRequest("a mask comes with the image that it is of", name)
    size, needed = (f"{each.width}x{each.height}" for each in (mask, references[0]))
    if size != needed:
        raise BadRequest(f"{name} is {size} but must match the image, {needed}", name)


def check_masked_size(width: int, height: int, fields: ImageFields) -> None:
    """Raise BadRequest for a size that no reference may have: the masked image is scaled to it."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        message = f"under a mask {width}x{height} is too long: choose another size"
        raise BadRequest(message, fields.named("size" if fields.width is None else "width"))


Size = tuple[int, int]
Box = tuple[int, int, int, int]


def asked_size(fields: ImageFields, tier: Tier, images: RequestImages) -> tuple[Size, Box | None]:
    """Return the width and height to generate, and the box to crop the image to, None for all.

    Without a size, the image has the canvas that a tier lays around a lone reference. Raises
    BadRequest if the fields for a size disagree.
    """
    canvas = None
    if not (fields.has_size or images.mask is not None or images.is_control):
        canvas = lone_canvas(images.references, tier)
    if canvas is None:
        return size_for(fields, tier, images.references), None
    return (canvas.width, canvas.height), canvas.crop


def size_for(fields: ImageFields, tier: Tier, references: tuple[SentImage, ...]) -> tuple[int, int]:
    """Return the width and height asked for, else the first reference's, else the default.

    Raises BadRequest if the fields for it disagree.
    """
    size, width, height = map(fields.named, ("size", "width", "height"))
    asked = None if fields.size in (None, "auto") else parse_size(fields.size or "", size)
    if fields.width is not None or fields.height is not None:
        if fields.width is None or fields.height is None:
            missing = width if fields.width is None else height
            raise BadRequest("width and height come together", missing)
        if asked not in (None, (fields.width, fields.height)):
            raise BadRequest(f"{size} and width x height disagree", size)
        check_size(fields.width, fields.height, tier, (width, height))
        return fields.width, fields.height
    if asked is not None:
        check_size(*asked, tier, (size, size))
        return asked
    if fields.aspect_ratio is not None or fields.resolution is not None:
        return shape_for(fields, tier, references)
    if references:
        return size_like(references[0], tier)
    return tier.default_side, tier.default_side


def shape_for(
    fields: ImageFields, tier: Tier, references: tuple[SentImage, ...]
) -> tuple[int, int]:
    """Return the size in the ratio that was sent, else the first reference's, else a square.

    Its area is the resolution that was sent, up to the tier's limit, else the tier's default.
    """
    ratio, side = 1.0, float(tier.default_side)
    if references:
        ratio = references[0].width / references[0].height
    if fields.aspect_ratio is not None:
        ratio = ratio_of(fields.aspect_ratio, fields.named("aspect_ratio"))
    if fields.resolution is not None:
        side = side_of(fields.resolution, fields.named("resolution"))
    width, height = shape_in(side, ratio)
    if tier.scales_sizes and width * height > tier.max_pixels:
        return round(width), round(height)
    return fitted(width, height, tier)


def steps_for(fields: ImageFields, tier: Tier) -> int:
    """Return the number of steps: the caller's, else that of `quality`, else the tier's."""
    num_steps = fields.num_inference_steps
    if num_steps is None:
        return tier.steps_at(fields.quality) or tier.num_steps
    if num_steps > tier.max_steps:
        name = fields.named("num_inference_steps")
        raise BadRequest(f"{name} must be 1 to {tier.max_steps}", name)
    return num_steps


class Steering(NamedTuple):
    """How a request is steered, by its own fields: what to steer away from, and how far."""

    guidance: float
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0


def steering_for(fields: ImageFields, tier: Tier, served: Collection[Tier]) -> Steering:
    """Return the caller's guidance and negative prompt, where the tier heeds them.

    A tier whose own scale is above 1 is always steered, by `guidance_scale`, and away from the
    empty prompt. Raises BadRequest for a negative prompt, or a scale above 1, that is not heeded.
    """
    negative, scale = fields.negative_prompt, fields.true_cfg_scale
    if negative is not None and not negative.strip():
        # Many clients always send an empty one. It steers only together with a scale.
        negative = "" if scale is not None and heeds(tier, "negative_prompt") else None
    for field, is_sent in (("negative_prompt", negative), ("true_cfg_scale", (scale or 0) > 1)):
        if is_sent:
            check_heeded(field, (tier,), served, fields.named(field))
    if tier.true_cfg_scale > 1:
        return steered(tier.guidance, negative or "", cfg_scale_for(fields, tier))
    guidance = fields.guidance_scale if tier.is_guided else None
    if guidance is None:
        guidance = tier.guidance
    return steered(guidance, negative, NEGATIVE_SCALE if scale is None else scale)


def steered(guidance: float, negative: str | None, scale: float) -> Steering:
    """Return these values; without a negative prompt if it would have no effect."""
    if negative is None or scale <= 1:
        return Steering(guidance)
    return Steering(guidance, negative, scale)


def cfg_scale_for(fields: ImageFields, tier: Tier) -> float:
    """Return the scale of a tier that is always steered: `guidance_scale` and `true_cfg_scale`.

    Raises BadRequest if they disagree.
    """
    sent = [each for each in (fields.guidance_scale, fields.true_cfg_scale) if each is not None]
    if len(set(sent)) > 1:
        names = [fields.named(name) for name in ("guidance_scale", "true_cfg_scale")]
        message = f"{' and '.join(names)} disagree: on {tier.name} they are the same"
        raise BadRequest(message, names[1])
    return sent[0] if sent else tier.true_cfg_scale


def strength_for(
    fields: ImageFields, tier: Tier, images: RequestImages, served: Collection[Tier]
) -> float:
    """Return how much of the image under the mask is replaced by noise at the start: 1 is all.

    Raises BadRequest where it would not be heeded; without an image it has no meaning.
    """
    strength = fields.strength
    if strength is None or strength == 1 or images.is_control or not images.references:
        return 1.0
    name = fields.named("strength")
    check_heeded("strength", (tier,), served, name)
    if images.mask is None:
        raise BadRequest(
            f"{name}: it is heeded only under a mask; without one, say in the prompt how near the"
            " answer stays to the image",
            name,
        )
    if not 0 < strength <= 1:
        raise BadRequest(f"{name} must be above 0, and at most 1", name)
    return strength


def seed_for(fields: ImageFields) -> int:
    """Return the first image's seed, random if not sent; the others count up from it.

    Raises BadRequest if the last image's would be too large.
    """
    if fields.seed is None:
        return secrets.randbelow(GENERATED_SEEDS)
    if fields.seed + (fields.n or 1) - 1 > MAX_SEED:
        seed, number = fields.named("seed"), fields.named("n")
        raise BadRequest(f"{seed} + {number} - 1 must be at most {MAX_SEED}", seed)
    return fields.seed


def encoding_for(fields: ImageFields, scaled_to: tuple[int, int] | None) -> Encoding:
    """Return the file format, PNG by default, and the size to which images are scaled."""
    default = Encoding()
    quality = fields.output_compression
    return Encoding(
        format=fields.output_format or default.format,
        quality=default.quality if quality is None else quality,
        scaled_to=scaled_to,
    )
