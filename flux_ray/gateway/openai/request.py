"""Make an `ImageRequest` of OpenAI's fields: check them and fill in the tier's defaults."""

import secrets
import uuid

from flux_ray.catalog import Canvas, Tier
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
from flux_ray.gateway.images.decode import MAX_ASPECT, SentImage
from flux_ray.gateway.openai.fields import MAX_SEED, ImageFields
from flux_ray.request import Encoding, ImageRequest, Mask, RgbImage

# Random seeds are below this, so that JavaScript clients read them exactly: it can up to 2**53.
GENERATED_SEEDS = 2**32


def request_for(
    fields: ImageFields,
    tier: Tier,
    limits: Limits,
    references: tuple[SentImage, ...],
    mask: Mask | None = None,
) -> ImageRequest:
    """Return the complete request for a tier, under a new id. Raises BadRequest, BadReference."""
    if len(fields.prompt) > limits.max_prompt_chars:
        message = f"prompt is longer than {limits.max_prompt_chars} characters"
        raise BadRequest(message, fields.named("prompt"))
    num_images = fields.n or 1
    if num_images > limits.max_images:
        name = fields.named("n")
        raise BadRequest(f"{name} must be 1 to {limits.max_images}", name)
    if len(references) > tier.max_references:
        raise BadReference(f"{tier.name} takes at most {tier.max_references} images", "image")
    if mask is not None:
        check_mask(mask, references, tier)
    canvas = None if fields.has_size or mask is not None else lone_canvas(references, tier)
    asked = (canvas.width, canvas.height) if canvas else size_for(fields, tier, references)
    width, height = generated_size(*asked, tier)
    if mask is not None and max(width, height) > MAX_ASPECT * min(width, height):
        # The masked image is a reference too, scaled to that size.
        raise BadRequest(f"under a mask {width}x{height} is too long: choose another size", "size")
    return ImageRequest(
        request_id=uuid.uuid4().hex,  # Not the client's: two clients may send the same one.
        tier=tier.name,
        prompt=fields.prompt,
        width=width,
        height=height,
        num_steps=steps_for(fields, tier),
        guidance=guidance_for(fields, tier),
        seed=seed_for(fields, num_images),
        num_images=num_images,
        references=rasters_for(references, tier),
        encoding=encoding_for(fields, None if asked == (width, height) else asked, canvas),
        mask=mask,
        num_previews=(fields.partial_images or 0) if fields.stream else 0,
    )


def rasters_for(references: tuple[SentImage, ...], tier: Tier) -> tuple[RgbImage, ...]:
    """Return the references, scaled down to what the tier takes of so many."""
    limit = tier.reference_limit(len(references))
    return tuple(each.raster_for(limit) for each in references)


def check_mask(mask: Mask, references: tuple[SentImage, ...], tier: Tier) -> None:
    """Raise BadRequest unless the tier takes masks and the first image has the mask's size."""
    if not tier.takes_mask:
        raise BadRequest(f"{tier.name} takes no masks", "mask")
    if not references:
        raise BadRequest("a mask comes with the image that it is of", "mask")
    size, needed = (f"{each.width}x{each.height}" for each in (mask, references[0]))
    if size != needed:
        raise BadRequest(f"mask is {size} but must match the image, {needed}", "mask")


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


def guidance_for(fields: ImageFields, tier: Tier) -> float:
    """Return the guidance: the caller's only on a tier where it has an effect."""
    if fields.guidance_scale is None or not tier.is_guided:
        return tier.guidance
    return fields.guidance_scale


def seed_for(fields: ImageFields, num_images: int) -> int:
    """Return the first image's seed, random if not sent; the others count up from it.

    Raises BadRequest if the last image's would be too large.
    """
    if fields.seed is None:
        return secrets.randbelow(GENERATED_SEEDS)
    if fields.seed + num_images - 1 > MAX_SEED:
        raise BadRequest(f"seed + n - 1 must be at most {MAX_SEED}", "seed")
    return fields.seed


def encoding_for(
    fields: ImageFields, scaled_to: tuple[int, int] | None, canvas: Canvas | None
) -> Encoding:
    """Return the file format, PNG by default, and how images are scaled, or cropped of a canvas."""
    default = Encoding()
    quality = fields.output_compression
    return Encoding(
        format=fields.output_format or default.format,
        quality=default.quality if quality is None else quality,
        scaled_to=scaled_to,
        cropped_to=None if canvas is None else canvas.crop,
    )
