"""The two kinds of FLUX.3 checkpoints, and how to open one before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import Flux3DistilledModularPipeline, Flux3ModularPipeline

from flux_ray.engine.loading import fetch, load_config
from flux_ray.weights.source import CONFIGS, INDEXES, WeightSource, source_for

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Flux3Kind:
    """A kind of FLUX.3 checkpoint: diffusers' class for it.

    `is_distilled`: the transformer is told the timestep that each step jumps to, and needs no
    classifier-free guidance.
    """

    pipeline: type[Flux3ModularPipeline]
    is_distilled: bool


KINDS = {
    "flux3-klein": Flux3Kind(Flux3DistilledModularPipeline, is_distilled=True),
    "flux3-klein-base": Flux3Kind(Flux3ModularPipeline, is_distilled=False),
}


def open_checkpoint(kind: Flux3Kind, weights: str) -> tuple[WeightSource, Path]:
    """Return the checkpoint's source and a local folder that holds its config files.

    Raise ValueError if the checkpoint is of another kind. No weights are downloaded yet, so
    a wrong name is found in seconds.
    """
    source = source_for(weights)
    folder = fetch(source, CONFIGS)
    check_index(kind, load_index(folder, weights), weights)
    check_folder(kind, folder, weights)
    return source, folder


def load_index(folder: Path, weights: str) -> dict[str, Any]:
    """Read the index of a checkpoint: that of the modular layout, if it has both."""
    for name in reversed(INDEXES):
        if (folder / name).is_file():
            return load_config(folder, name)
    raise ValueError(f"weights {weights!r} have no {' or '.join(INDEXES)}")


def check_index(kind: Flux3Kind, index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint was saved from this kind's pipeline class."""
    name, expected = index.get("_class_name"), kind.pipeline.__name__
    if name != expected:
        raise ValueError(f"weights {weights!r} are for {name}, not {expected}")


def check_folder(kind: Flux3Kind, folder: Path, weights: str) -> None:
    """Raise ValueError if a component is missing, or the transformer is of the other kind.

    A modular index may name components in other repositories. They are not followed: what is
    loaded would not be pinned by the revision of this one.
    """
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"weights {weights!r} have no folder {missing[0]}: put all components into one folder"
            " or repository"
        )
    is_flow_map = bool(load_config(folder / "transformer").get("flow_map"))
    if is_flow_map != kind.is_distilled:
        raise ValueError(
            f"the transformer of weights {weights!r} has flow_map {str(is_flow_map).lower()}, which"
            f" does not fit {kind.pipeline.__name__}"
        )
