"""The FLUX.1 family: dev and what has its transformer, schnell, Kontext, Fill, Depth and Canny.

It runs its own denoise steps over the parts of diffusers' pipelines. The kinds differ in what they
give the transformer beside the noisy latents.
"""

from flux_ray.engine.api import FamilySpec
from flux_ray.engine.flux1.empty_model import empty_model
from flux_ray.engine.flux1.pipeline import Flux1
from flux_ray.engine.flux1.text_encoder import load_prompt_encoder
from flux_ray.engine.flux1.variants import Flux1Control, Flux1Fill, Flux1Kontext


def spec(adapter: type[Flux1], *heeds: str) -> FamilySpec:
    """Return the spec of a kind, which heeds guidance besides `heeds`."""
    return FamilySpec(
        load=adapter.load,
        load_prompt_encoder=load_prompt_encoder,
        empty_model=empty_model,
        heeds=frozenset({"guidance", *heeds}),
    )


STEERED = ("negative_prompt", "true_cfg_scale", "mask", "strength")
FAMILIES = {
    "flux1": spec(Flux1, *STEERED),
    "flux1-kontext": spec(Flux1Kontext, *STEERED, "references"),
    "flux1-fill": spec(Flux1Fill, "mask", "references"),
    "flux1-control": spec(Flux1Control, "control_image"),
}
