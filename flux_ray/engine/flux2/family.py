"""What tells one family of FLUX.2 from another, apart from its weights: how it takes prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from flux_ray.engine.loading import CONFIGS, TextModel, WeightSource, fetch, load_config, source_for


@dataclass(frozen=True)
class Family:
    """`pipeline` is diffusers' class, whose `encode_prompt` formats the prompt.

    `layers` are the hidden states that it joins into embeddings; `num_tokens` counts those of the
    formatted prompt, as long as it is. `check_index` raises ValueError for other checkpoints.
    """

    pipeline: type[DiffusionPipeline]
    layers: tuple[int, ...]
    text_model: Callable[[Path, int], TextModel]
    load_tokenizer: Callable[[Path], Any]
    num_tokens: Callable[[Any, str], int]
    check_index: Callable[[dict[str, Any], str], None]


def open_checkpoint(family: Family, weights: str) -> tuple[WeightSource, Path]:
    """Where the checkpoint is, and its folder with the configs; ValueError for another family's."""
    source = source_for(weights)
    folder = fetch(source, CONFIGS)
    family.check_index(load_config(folder, "model_index.json"), weights)
    return source, folder


def check_class(index: dict[str, Any], pipeline: type[DiffusionPipeline], weights: str) -> None:
    """Another pipeline's checkpoint would be drawn wrongly without a word."""
    name = index.get("_class_name")
    if name != pipeline.__name__:
        raise ValueError(f"weights {weights!r} are for {name}, not {pipeline.__name__}")
