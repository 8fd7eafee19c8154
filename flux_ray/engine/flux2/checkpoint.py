"""The kinds of FLUX.2 checkpoints: what differs between them apart from the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)
from torch import nn

from flux_ray.engine.api import Placement, TextModel
from flux_ray.engine.loading import fetch, load_config, load_pipeline, load_transformer
from flux_ray.parallel.lora import lora_deltas
from flux_ray.weights.source import CONFIGS, IMAGE_PARTS, WeightSource, source_for


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


def check_class(index: dict[str, Any], pipeline: type[DiffusionPipeline], weights: str) -> None:
    """Raise ValueError unless the checkpoint was saved from this pipeline class.

    The checkpoint of another pipeline may load and then generate wrong images without any error.
    """
    name = index.get("_class_name")
    if name != pipeline.__name__:
        raise ValueError(f"weights {weights!r} are for {name}, not {pipeline.__name__}")


def load_parts(
    kind: CheckpointKind,
    source: WeightSource,
    placement: Placement,
    change: Callable[[nn.Module], None] | None,
) -> DiffusionPipeline:
    """Load the checkpoint's pipeline with this rank's part of the transformer, LoRAs added.

    `change` is done to the transformer before it splits its tokens over sequence ranks.
    """
    folder = fetch(source, IMAGE_PARTS)
    pipeline = load_pipeline(folder, placement, kind.pipeline)
    check_scheduler(pipeline.scheduler)
    deltas = lora_deltas(placement.loras, kind.pipeline, placement.device)
    transformer = load_transformer(Flux2Transformer2DModel, folder, placement, deltas, change)
    pipeline.register_modules(transformer=transformer)
    return pipeline


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless the checkpoint's scheduler makes Euler steps without added noise.

    The adapter makes no other steps, and would generate wrong images without any error.
    """
    if (
        not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or scheduler.config.stochastic_sampling
    ):
        raise ValueError(f"the FLUX.2 adapter cannot step {type(scheduler).__name__}")
