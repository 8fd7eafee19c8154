"""The FLUX.2 family: klein, step-distilled for one GPU, and dev, which pro and max are sizes of.

It runs its own denoise steps over the parts of diffusers' pipelines. Klein and dev differ in their
text encoders and in how a prompt is formatted for them.
"""

from flux_ray.engine.api import FamilySpec
from flux_ray.engine.flux2.empty_model import empty_model
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.flux2.text_encoder import load_prompt_encoder

FAMILIES = {
    "flux2-klein": FamilySpec(
        load=Flux2.load,
        load_prompt_encoder=load_prompt_encoder,
        empty_model=empty_model,
        heeds=frozenset({"references", "mask"}),
        is_for_one_gpu=True,
    ),
    "flux2-dev": FamilySpec(
        load=Flux2.load,
        load_prompt_encoder=load_prompt_encoder,
        empty_model=empty_model,
        heeds=frozenset({"references", "mask", "guidance"}),
    ),
}
