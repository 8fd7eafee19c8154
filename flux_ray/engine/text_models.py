"""The text models: what is built of each, how it is split, and this rank's part of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    Mistral3Config,
    MistralModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from flux_ray.config.tier import Quantization
from flux_ray.engine.loading import Placement
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Axis, Mesh

# transformers has none for T5 (of version 1.1, with gates). The position bias is an embedding
# [buckets, heads] of the first layer, which gives it to the others.
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
T5_PLAN = {
    **{f"encoder.block.*.layer.0.SelfAttention.{name}": "colwise" for name in "qkv"},
    "encoder.block.*.layer.0.SelfAttention.o": "rowwise",
    T5_BIAS: "rowwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wo": "rowwise",
}


@dataclass(frozen=True)
class TextModel:
    """A text model before its weights.

    `num_heads` are those that cannot be cut: with grouped queries, of keys and values.
    `embedding` is the parameter by which a checkpoint's prefix is found.
    """

    build: Callable[[], PreTrainedModel]
    plan: Mapping[str, Any]
    num_heads: int
    embedding: str = "embed_tokens.weight"


def qwen3(folder: Path, num_layers: int) -> TextModel:
    """The first layers of klein's encoder."""
    return first_layers(Qwen3Model, Qwen3Config.from_pretrained(folder), num_layers)


def mistral3(folder: Path, num_layers: int) -> TextModel:
    """The first layers of dev's encoder, without its eyes."""
    config = Mistral3Config.from_pretrained(folder).text_config
    return first_layers(MistralModel, config, num_layers)


def first_layers(model_class: type[PreTrainedModel], config: Any, num_layers: int) -> TextModel:
    """A decoder whose hidden_states[k], k <= num_layers, are those of the whole one, to the bit."""
    if config.num_hidden_layers < num_layers:
        raise ValueError(
            f"a text encoder of {config.num_hidden_layers} layers has no hidden state {num_layers}"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        # One each, or transformers does not write the configuration. Mistral's has none.
        config.layer_types = config.layer_types[:num_layers]

    def build() -> PreTrainedModel:
        model = model_class(config)
        # The last hidden state is taken after it, but in the whole model it is not the last.
        model.norm = nn.Identity()
        return model

    return TextModel(build, config.base_model_tp_plan, config.num_key_value_heads)


def t5(folder: Path) -> TextModel:
    """FLUX.1's encoder, whole."""
    config = T5Config.from_pretrained(folder)

    def build() -> PreTrainedModel:
        model = T5EncoderModel(config)
        # One module of two names: the checkpoint has it once.
        model.encoder.embed_tokens = model.shared
        # diffusers' reading of the plan asks every module for one.
        model.get_submodule(T5_BIAS).bias = None  # type: ignore[assignment]
        return model

    return TextModel(build, T5_PLAN, config.num_heads, embedding="shared.weight")


def encoder_axis(num_heads: int, mesh: Mesh, quantization: Quantization | None = None) -> Axis:
    """Over which ranks a text encoder is split: all of them where its heads allow it.

    Else those of the tensor axis, or ValueError. 4-bit weights cannot be cut, and are not where
    only tokens are shared.
    """
    for axis in (mesh.tensor,) if quantization == "nf4" else (mesh.world, mesh.tensor):
        if num_heads % axis.size == 0:
            return axis
    raise ValueError(
        f"parallel.tensor {mesh.tensor.size} does not divide the text encoder's {num_heads} heads"
        " (of keys and values)"
    )


def prefix_in(checkpoint: Checkpoint, embedding: str) -> str:
    """What the checkpoint writes before the model's own names."""
    found = [name for name in checkpoint.files if f".{name}".endswith(f".{embedding}")]
    if len(found) != 1:
        raise ValueError(f"{checkpoint.folder} has {len(found)} tensors named {embedding}")
    return found[0].removesuffix(embedding)


def load_text_model(model: TextModel, folder: Path, placement: Placement) -> nn.Module:
    """This rank's part of the text model, from the component's folder."""
    quantization = placement.encoder_quantization
    axis = encoder_axis(model.num_heads, placement.mesh, quantization)
    checkpoint = Checkpoint(folder)
    recipe = LoadSpec(
        checkpoint,
        axis,
        placement.torch_dtype,
        placement.device,
        prefix=prefix_in(checkpoint, model.embedding),
        whole=False,
        quantization=quantization,
    )
    return load_sharded(model.build, model.plan, recipe)
