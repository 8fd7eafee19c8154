"""The kinds of FLUX.1 checkpoints: which pipeline each was saved from."""

from pathlib import Path

from diffusers import (
    DiffusionPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)

from flux_ray.catalog import Tier
from flux_ray.engine.loading import check_class, fetch, load_config
from flux_ray.weights.source import CONFIGS, WeightSource, source_for

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "flux1": FluxPipeline,
    "flux1-kontext": FluxKontextPipeline,
    "flux1-fill": FluxFillPipeline,
    "flux1-control": FluxControlPipeline,
}


def open_checkpoint(tier: Tier, weights: str) -> tuple[WeightSource, Path]:
    """Return the checkpoint's source and a local folder that holds its config files.

    Raise ValueError if the checkpoint is of another kind than the tier's. No weights are downloaded
    yet, so a wrong name is found in seconds.
    """
    source = source_for(weights)
    folder = fetch(source, CONFIGS)
    check_class(load_config(folder, "model_index.json"), PIPELINES[tier.family], weights)
    # dev and schnell have the same pipeline; only this tells them apart.
    is_guided = bool(load_config(folder / "transformer")["guidance_embeds"])
    if is_guided != tier.is_guided:
        words = ("have no embedded guidance", "have embedded guidance")
        raise ValueError(
            f"weights {weights!r} {words[is_guided]}, which does not fit the tier {tier.name}:"
            " name a checkpoint of its own model"
        )
    return source, folder
