"""The model families that can be served, and the way from a tier to what its family provides."""

from flux_ray.catalog import Tier
from flux_ray.engine import flux1, flux2, flux3
from flux_ray.engine.api import Adapter, EmptyModel, FamilySpec, Placement, PromptEncoder
from flux_ray.weights.source import weights_of

FAMILIES: dict[str, FamilySpec] = {**flux1.FAMILIES, **flux2.FAMILIES, **flux3.FAMILIES}


def family_of(tier: Tier) -> FamilySpec:
    """Return the spec of the tier's family."""
    return FAMILIES[tier.family]


def load_adapter(tier: Tier, weights: str | None, placement: Placement) -> Adapter:
    """Load the tier's model from the operator's `weights`, or from the catalogue's if None.

    Raise ValueError if the weights do not fit the tier or cannot be split as `placement` says.
    """
    return family_of(tier).load(weights_of(tier, weights), placement, tier)


def load_prompt_encoder(tier: Tier, weights: str | None, placement: Placement) -> PromptEncoder:
    """Load only the tier's text encoder, for a process that all of its replicas share."""
    return family_of(tier).load_prompt_encoder(weights_of(tier, weights), placement, tier)


def empty_model(tier: Tier, weights: str | None) -> EmptyModel:
    """Build the tier's modules on the meta device, to count their bytes.

    The shapes are the checkpoint's if `weights` is a local folder or the embedded checkpoint, else
    the published ones. The hub is never asked: a plan needs neither network nor licence. Raise
    ValueError if `weights` can be neither.
    """
    return family_of(tier).empty_model(tier, weights)
