"""The kinds of FLUX.2 checkpoints: what differs between them apart from the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from flux_ray.engine.api import TextModel
from flux_ray.engine.loading import fetch, load_config
from flux_ray.weights.source import CONFIGS, WeightSource, source_for


@dataclass(frozen=True)
class CheckpointKind:
    """How one kind of FLUX.2 checkpoint encodes prompts.

    `pipeline`: diffusers' class, whose `encode_prompt` formats the prompt and encodes it.
    `layers`: which hidden states of the text model it concatenates into the embeddings.
    `text_model`: builds the text model from its folder, with as many layers as are needed.
    `num_tokens`: counts the tokens of the formatted prompt before it is cut.
    `check_index`: raises ValueError if model_index.json is of another kind of checkpoint.
    `keeps_keys`: the keys and values of references are computed once, and are no tokens of a step.
    """

    pipeline: type[DiffusionPipeline]
    layers: tuple[int, ...]
    text_model: Callable[[Path, int], TextModel]
    load_tokenizer: Callable[[Path], Any]
    num_tokens: Callable[[Any, str], int]
    check_index: Callable[[dict[str, Any], str], None]
    keeps_keys: bool = False


def open_checkpoint(kind: CheckpointKind, weights: str) -> tuple[WeightSource, Path]:
    """Return the checkpoint's source and a local folder that holds its config files.

    Raise ValueError if the checkpoint is of another kind. No weights are downloaded yet, so
    a wrong name is found in seconds.
    """
    source = source_for(weights)
    folder = fetch(source, CONFIGS)
    kind.check_index(load_config(folder, "model_index.json"), weights)
    return source, folder
