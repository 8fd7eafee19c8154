"""What a caller sent and did not get: said in the answer, never silently dropped."""

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.gateway.fields.foreign import (
    NO_EFFECT,
    REFUSED,
    SILENT,
    is_image_name,
    is_mask_name,
    is_nothing,
)
from flux_ray.gateway.fields.sizes import side_of
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.request import Finished, ImageResult, Preview

MAX_NAMED_FIELDS = 20


def warnings_of(fields: ImageFields, drawn: ImageResult | Preview | Finished) -> list[str]:
    """All that is to be said: of the fields first, then what its replica had to say."""
    said = drawn.warnings if isinstance(drawn, ImageResult) else ()
    return [*warnings_for(fields, tier_for(drawn.tier)), *said]


def warnings_for(fields: ImageFields, tier: Tier) -> list[str]:
    """What this tier does not heed, by the names that the caller used."""
    extra = fields.model_extra or {}
    idle = [name for name in sorted(extra.keys() & NO_EFFECT) if not is_nothing(extra[name])]
    names = [fields.named(name) for name in [*unheeded(fields, tier), *idle]]
    warnings = [f"{name} has no effect on {tier.name}" for name in names]
    if fields.stream and fields.response_format == "url":
        warnings.append("response_format has no effect on a stream")
    if is_too_fine(fields, tier):
        name = fields.named("resolution")
        warnings.append(f"{name} is more than {tier.name} draws: the image is as large as it can")
    return warnings + unknown_warnings(fields)


def is_too_fine(fields: ImageFields, tier: Tier) -> bool:
    """Whether a resolution counts, and has more pixels than this tier draws."""
    if fields.resolution is None or tier.scales_sizes:
        return False
    if fields.size is not None or fields.width is not None:
        return False
    return side_of(fields.resolution) ** 2 > tier.max_pixels


def unknown_warnings(fields: ImageFields) -> list[str]:
    """Name the fields that nobody here has heard of."""
    known = NO_EFFECT | SILENT | REFUSED.keys()
    unknown = sorted(
        fields.named(name)
        for name in (fields.model_extra or {}).keys() - known
        if not is_image_name(name) and not is_mask_name(name)
    )
    return [f"unknown field {name[:80]!r} was ignored" for name in unknown[:MAX_NAMED_FIELDS]]


def unheeded(fields: ImageFields, tier: Tier) -> list[str]:
    """Fields that count on other tiers, or with other values of other fields."""
    names = []
    if fields.guidance_scale is not None and not tier.is_guided:
        names.append("guidance_scale")
    if fields.negative_prompt:
        names.append("negative_prompt")
    is_preset = tier.steps_at(fields.quality) is not None and fields.num_inference_steps is None
    if fields.quality not in (None, "auto") and not is_preset:
        names.append("quality")
    if fields.output_compression is not None and fields.output_format in (None, "png"):
        names.append("output_compression")
    if fields.partial_images and not fields.stream:
        names.append("partial_images")
    return names
