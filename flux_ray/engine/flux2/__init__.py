"""The FLUX.2 family: klein for one GPU, in several kinds, and dev, which pro and max are sizes of.

It runs its own denoise steps over the parts of diffusers' pipelines. Klein and dev differ in their
text encoders and in how a prompt is formatted for them. The kinds of klein differ in their weights:
step-distilled; base, which needs guidance by a second forward; and KV, which keeps what it computed
of references.
"""

from dataclasses import replace

from flux_ray.engine.api import FamilySpec
from flux_ray.engine.flux2.empty_model import empty_model
from flux_ray.engine.flux2.klein_kv import Flux2KleinKv
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.flux2.text_encoder import load_prompt_encoder

KLEIN = FamilySpec(
    load=Flux2.load,
    load_prompt_encoder=load_prompt_encoder,
    empty_model=empty_model,
    heeds=frozenset({"references", "mask", "strength"}),
    is_for_one_gpu=True,
)
FAMILIES = {
    "flux2-klein": KLEIN,
    "flux2-klein-base": replace(KLEIN, heeds=KLEIN.heeds | {"guidance", "true_cfg_scale"}),
    "flux2-klein-kv": replace(KLEIN, load=Flux2KleinKv.load),
    "flux2-dev": replace(
        KLEIN,
        heeds=frozenset({"references", "mask", "guidance"}),
        is_for_one_gpu=False,
    ),
}
