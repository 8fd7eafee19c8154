"""What a caller sent and did not get: said in the answer, never silently dropped."""

from flux_ray.catalog import Tier, tier_for
from flux_ray.gateway.openai_fields import GUIDANCE, STEPS, ImageFields
from flux_ray.gateway.openai_references import PICTURE_FIELDS
from flux_ray.gateway.openai_unserved import ASKS_NOTHING, NO_EFFECT, SILENT
from flux_ray.request import Finished, ImageResult, Preview

MAX_NAMED_FIELDS = 20


def warnings_of(fields: ImageFields, drawn: ImageResult | Preview | Finished) -> list[str]:
    """All that is to be said: of the fields first, then what its replica had to say."""
    said = drawn.warnings if isinstance(drawn, ImageResult) else ()
    return [*warnings_for(fields, tier_for(drawn.tier)), *said]


def warnings_for(fields: ImageFields, tier: Tier) -> list[str]:
    """What this tier does not heed, by the names that the caller used."""
    extra = fields.model_extra or {}
    names = unheeded(fields, tier) + [
        name
        for name in sorted(extra.keys() & NO_EFFECT)
        if str(extra[name]).lower() not in ASKS_NOTHING
    ]
    unknown = sorted(extra.keys() - NO_EFFECT - SILENT - PICTURE_FIELDS)[:MAX_NAMED_FIELDS]
    warnings = [f"{name} has no effect on {tier.name}" for name in names]
    if fields.stream and fields.response_format == "url":
        warnings.append("response_format has no effect on a stream")
    return warnings + [f"unknown field {name[:80]!r} was ignored" for name in unknown]


def unheeded(fields: ImageFields, tier: Tier) -> list[str]:
    """Fields that count on other tiers, or with other values of other fields."""
    names = []
    guidance = fields.sent_as(GUIDANCE)
    if guidance is not None and not tier.is_guided:
        names.append(guidance)
    if fields.negative_prompt:
        names.append("negative_prompt")
    is_preset = tier.steps_at(fields.quality) is not None and fields.sent_as(STEPS) is None
    if fields.quality not in (None, "auto") and not is_preset:
        names.append("quality")
    if fields.output_compression is not None and fields.output_format in (None, "png"):
        names.append("output_compression")
    if fields.partial_images and not fields.stream:
        names.append("partial_images")
    return names
