"""Which fields each tier heeds: one table for all dialects, whose data are the catalogue's rows.

A field that would change the image is refused on a tier that does not heed it, and the error names
the tiers here that do. Each field has a value that asks for nothing, which every tier accepts: some
clients always send it.
"""

from collections.abc import Callable, Iterable

from flux_ray.catalog import Tier
from flux_ray.errors import BadRequest

# By our names of the fields. `image` stands for references under all of their names.
HEEDS: dict[str, Callable[[Tier], bool]] = {
    "image": lambda tier: tier.max_references > 0,
    "mask": lambda tier: tier.takes_mask,
    "control_image": lambda tier: tier.takes_control,
    "guidance_scale": lambda tier: tier.is_guided or tier.true_cfg_scale > 1,
    "negative_prompt": lambda tier: tier.takes_negative,
    "true_cfg_scale": lambda tier: tier.takes_negative or tier.true_cfg_scale > 1,
    "strength": lambda tier: tier.takes_strength,
}


def heeds(tier: Tier, field: str) -> bool:
    """Return whether the tier heeds a field of this table."""
    return HEEDS[field](tier)


def check_heeded(
    field: str, tiers: Iterable[Tier], served: Iterable[Tier], called: str | None = None
) -> None:
    """Raise BadRequest unless one of `tiers` heeds the field; it names those of `served` that do.

    `called` is the caller's own name of the field.
    """
    tiers, name = tuple(tiers), (called or field)[:80]
    if any(heeds(tier, field) for tier in tiers):
        return
    names = " and ".join(tier.name for tier in tiers)
    others = ", ".join(tier.name for tier in served if heeds(tier, field))
    told = f"these models here do: {others}" if others else "nor does any other model here"
    raise BadRequest(f"{name}: {names} does not heed it; {told}", name)
