"""The FLUX.3 family: klein, step-distilled, and its base model, with classifier-free guidance.

It runs its own denoise steps over the parts of diffusers' modular blocks. Both kinds share all
code: what differs is whether the transformer is told the timestep that a step jumps to.
"""

from flux_ray.engine.api import FamilySpec
from flux_ray.engine.flux3.empty_model import empty_model
from flux_ray.engine.flux3.pipeline import Flux3
from flux_ray.engine.flux3.text_encoder import load_prompt_encoder

FAMILIES = {
    "flux3-klein": FamilySpec(
        load=Flux3.load,
        load_prompt_encoder=load_prompt_encoder,
        empty_model=empty_model,
        heeds=frozenset({"references"}),
        is_for_one_gpu=True,
    ),
    "flux3-klein-base": FamilySpec(
        load=Flux3.load,
        load_prompt_encoder=load_prompt_encoder,
        empty_model=empty_model,
        heeds=frozenset({"references", "guidance", "negative_prompt", "true_cfg_scale"}),
        is_for_one_gpu=True,
    ),
}
