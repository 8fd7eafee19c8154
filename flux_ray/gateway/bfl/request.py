"""Make an `ImageRequest` of BFL's fields and images.

It goes by way of OpenAI's fields, so that their checks and warnings hold here too. What differs is
the size, whose rules are BFL's, and the image to fill, whose alpha channel may be its mask.
"""

from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from typing import Any

from flux_ray.catalog import Tier
from flux_ray.config import Limits
from flux_ray.errors import BadRequest
from flux_ray.gateway.bfl.fields import MAX_PIXELS, MIN_SIDE, BflFields
from flux_ray.gateway.fields.sizes import (
    fitted,
    lone_canvas,
    ratio_of,
    shape_in,
    side_of,
    size_like,
    size_notes,
    sized,
)
from flux_ray.gateway.heeded import heeds
from flux_ray.gateway.images.decode import SentImage
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.images.masks import decode_painted_mask, decode_with_alpha
from flux_ray.gateway.images.sources import RequestImages, read_images
from flux_ray.gateway.model_names import ResolvedModel
from flux_ray.gateway.openai.fields import MAX_NAMED_FIELDS, ImageFields, warnings_for
from flux_ray.gateway.openai.references import sources_in_json
from flux_ray.gateway.openai.request import request_for
from flux_ray.request import ImageFormat, ImageRequest

CONTROL, PREPROCESSED = "control_image", "preprocessed_image"
TAKEN_AS_IT_IS = (
    "the control image was taken for edges or depths: none are computed from a photograph here."
    f" Send them as {PREPROCESSED}"
)


async def images_of(
    sent: BflFields, target: ResolvedModel, limits: Limits, fetcher: Fetcher
) -> RequestImages:
    """Read and decode the images of a request. Raises BadReference, BadRequest.

    If `image` is sent without a mask, its alpha channel is the mask, and `preprocessed_image` is
    taken before `control_image`, both as in BFL's API. BFL makes edges or depths of a
    `control_image`; here it must show them already, which a note says.
    """
    sources = {} if sent.image is None else {"image": sent.image}
    sources |= sent.others
    if sources.get(PREPROCESSED):
        sources.pop(CONTROL, None)
    taken = sources_in_json(sources, target)
    read_erased = None if sent.image is None else decode_with_alpha
    images = await read_images(taken, target, limits, fetcher, decode_painted_mask, read_erased)
    if not taken.is_control or taken.references[0].param == PREPROCESSED:
        return images
    return images._replace(notes=(*images.notes, TAKEN_AS_IT_IS))


# Every job gets previews, for clients that poll it; but with few steps the image itself is there as
# soon as a preview would be.
NUM_PREVIEWS = 3
MIN_PREVIEWED_STEPS = 8


def job_request_for(
    sent: BflFields,
    name: str,
    tier: Tier,
    limits: Limits,
    images: RequestImages,
    served: Collection[Tier] = (),
) -> ImageRequest:
    """Return the complete request; the default format depends on `name`, the route's model.

    Errors about a field that the tier does not heed name those of `served` that do.
    """
    fields = openai_fields(sent, name, tier, images.references)
    request = request_for(fields, tier, limits, images, served)
    is_long = request.num_steps >= MIN_PREVIEWED_STEPS
    return replace(request, num_previews=NUM_PREVIEWS if is_long else 0)


# Fields that have the same names on OpenAI's routes.
SAME_THERE = (
    "prompt",
    "seed",
    "negative_prompt",
    "true_cfg_scale",
    "strength",
    "allow_truncation",
)


def openai_fields(
    sent: BflFields, name: str, tier: Tier, references: tuple[SentImage, ...]
) -> ImageFields:
    """Return the fields as OpenAI's routes have them, with the size already chosen."""
    width, height = size_for(sent, tier, references)
    is_free = not (sent.width or sent.height or sent.aspect_ratio or sent.resolution)
    # What is generated on the reference's canvas is cropped back to it, unless a size is given.
    keeps_canvas = is_free and lone_canvas(references, tier) is not None
    wish: dict[str, Any] = {field: getattr(sent, field) for field in SAME_THERE} | {
        "width": None if keeps_canvas else width,
        "height": None if keeps_canvas else height,
        # Clients send a number of steps for the BFL model that they know, such as 28. A distilled
        # tier would then take seven times as long, for no better image.
        "num_inference_steps": sent.steps if heeds(tier, "guidance_scale") else None,
        "guidance_scale": sent.guidance,
        "output_format": sent.output_format or default_format(name),
    }
    names = {"num_inference_steps": sent.named("steps"), "guidance_scale": sent.named("guidance")}
    names |= {field: sent.named(field) for field in (*SAME_THERE, "width", "height")}
    return ImageFields.of(wish, names)


def default_format(name: str) -> ImageFormat:
    """Return BFL's default format of a model: PNG for Kontext, JPEG for all others."""
    return "png" if "kontext" in name else "jpeg"


def size_for(sent: BflFields, tier: Tier, references: tuple[SentImage, ...]) -> tuple[int, int]:
    """Return width and height: from the pixels sent, the ratio, the first reference, or the tier.

    Sizes that BFL's API takes but the tier cannot do are fitted to the tier instead of refused, as
    some clients always send one. Raises BadRequest.
    """
    width, height = pixels_for(sent, tier, references)
    if (sent.width or sent.height) and width * height > MAX_PIXELS:
        field = sent.named("width" if sent.width else "height")
        raise BadRequest(f"width x height must be at most {MAX_PIXELS} pixels", field)
    if tier.scales_sizes:
        return round(width), round(height)
    return fitted(width, height, tier)


def pixels_for(
    sent: BflFields, tier: Tier, references: tuple[SentImage, ...]
) -> tuple[float, float]:
    """Return the size before it is fitted to the tier.

    If one side alone was sent, the other follows from the ratio of the default size.
    """
    default: tuple[float, float] = tier.default_side, tier.default_side
    if references:
        default = size_like(references[0], tier)
    if not (sent.width and sent.height):
        default = shape_for(sent, tier, default)
    for field in ("width", "height"):
        if 0 < (getattr(sent, field) or MIN_SIDE) < MIN_SIDE:
            name = sent.named(field)
            raise BadRequest(f"{name} must be 0 or at least {MIN_SIDE}", name)
    if sent.width and not sent.height:
        return sent.width, sent.width * default[1] / default[0]
    if sent.height and not sent.width:
        return sent.height * default[0] / default[1], sent.height
    return sent.width or default[0], sent.height or default[1]


def shape_for(sent: BflFields, tier: Tier, default: tuple[float, float]) -> tuple[float, float]:
    """Return the size of the ratio and resolution that were sent, or `default` without either."""
    if sent.aspect_ratio is None and sent.resolution is None:
        return default
    ratio = default[0] / default[1]
    if sent.aspect_ratio is not None:
        ratio = ratio_of(sent.aspect_ratio, sent.named("aspect_ratio"))
    if sent.resolution is None:
        return sized(ratio, tier)
    return shape_in(side_of(sent.resolution, sent.named("resolution")), ratio)


def job_warnings_for(
    sent: BflFields,
    name: str,
    request: ImageRequest,
    tier: Tier,
    references: tuple[SentImage, ...] = (),
) -> tuple[str, ...]:
    """Return a warning for each thing that the caller sent and does not get."""
    warnings = warnings_for(openai_fields(sent, name, tier, references), request)
    if sent.steps is not None and not heeds(tier, "guidance_scale"):
        warnings.append(f"{sent.named('steps')} has no effect on {tier.name}")
    warnings += [f"{field} has no effect on {tier.name}" for field in sent.asked_in_vain]
    warnings += size_notes(request)
    generated = request.output_size
    width, height = map(round, pixels_for(sent, tier, references))
    is_too_fine = sent.resolution is not None and width * height > tier.max_pixels
    is_smaller = is_too_fine and not tier.scales_sizes
    if is_smaller or (sent.width or generated[0], sent.height or generated[1]) != generated:
        warnings.append(
            f"{width}x{height} is drawn as {generated[0]}x{generated[1]} by {tier.name}"
        )
    unknown = (f"unknown field {each[:80]!r} was ignored" for each in sent.unknown)
    return (*warnings, *islice(unknown, MAX_NAMED_FIELDS))
