"""What a request has in common with others that a replica may have encoded before."""

from flux_ray.request import ImageRequest
from flux_ray.router.pricing.cost_model import CostModel


def affinity_of(request: ImageRequest, prices: CostModel) -> tuple[tuple[str, float], ...]:
    """Names of its prompt and its references, with the seconds that a replica saves by each."""
    prompt_s, references_s = prices.encode_parts_s(request)
    names = [(request.prompt_name, prompt_s)]
    if request.references:
        names.append((request.references_name, references_s))
    return tuple((name, saved_s) for name, saved_s in names if saved_s > 0)
