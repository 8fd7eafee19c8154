"""Weights to modules: embedded, a folder, or a hub id with its revision; to each rank its part.

The text models: what is built of each, how it is split, and this rank's part of it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars
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
from transformers.utils import logging as transformers_logging

from flux_ray.catalog.tiers import EMBEDDED, Tier
from flux_ray.config.tier import Lora, Quantization
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import Delta, LoadSpec, load_sharded
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import check_quantization
from flux_ray.parallel.sequence import check_heads, split_sequence
from flux_ray.tiny import CHECKPOINT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)")
# What to take of a checkpoint, as the hub names files. Its top folder has other copies of the
# weights, and `*.bin` runs code when it is read.
CONFIGS = ("model_index.json", "*/*.json")
IMAGE_PARTS = ("transformer/*.safetensors", "vae/*.safetensors")
PROMPT_PARTS = (
    "text_encoder/*.safetensors",
    *(f"tokenizer/*.{ending}" for ending in ("txt", "jinja", "model")),
)


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from; a revision means the hub, none a folder."""

    location: str
    revision: str | None = None


@dataclass(frozen=True)
class Placement:
    """How and where the weights are held: what of the tier's args the engine heeds, and the rank.

    `device` is the rank's own; `mesh` its place among the ranks that share the model.
    """

    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    mesh: Mesh = field(default_factory=Mesh)
    quantization: Quantization | None = None
    encoder_quantization: Quantization | None = None
    loras: tuple[Lora, ...] = ()
    text_encoder: Literal["colocated", "shared"] = "colocated"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of activations, and of the weights that are not quantized."""
        return DTYPES[self.dtype]


def weights_of(tier: Tier, weights: str | None) -> str:
    """The operator's weights, or the catalogue's."""
    chosen = weights or tier.weights
    if chosen is None:
        raise ValueError(f"tier {tier.name} needs weights")
    return chosen


def source_for(weights: str) -> WeightSource:
    """The source that a config's `weights` names; ValueError says what may be written."""
    if weights == EMBEDDED:
        weights = str(CHECKPOINT)
    if weights and Path(weights).is_dir():
        return WeightSource(weights)
    if match := HUB_ID.fullmatch(weights):
        return WeightSource(match["repository"], match["revision"])
    raise ValueError(
        f"weights {weights!r}: neither an existing folder nor a hub id with its revision"
        " (owner/name@revision)"
    )


def fetch(source: WeightSource, patterns: Iterable[str]) -> Path:
    """The folder with those files of the source; a folder never reaches for the network."""
    hide_progress()
    if source.revision is None:
        return Path(source.location)
    return Path(
        snapshot_download(
            source.location, revision=source.revision, allow_patterns=sorted(patterns)
        )
    )


def hide_progress() -> None:
    """The ranks' bars would draw over each other in the logs."""
    disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's config.json, or the checkpoint's model_index.json."""
    config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def check_transformer(folder: Path, placement: Placement) -> None:
    """Refuse what cannot be done with the transformer of a checkpoint; reads no weights."""
    mesh, num_heads = placement.mesh, load_config(folder / "transformer")["num_attention_heads"]
    check_heads(num_heads, mesh.tensor.size, mesh.sequence.size)
    check_quantization(placement.quantization, mesh.tensor)


def load_transformer(
    model_class: type[Flux2Transformer2DModel],
    folder: Path,
    placement: Placement,
    deltas: tuple[Delta, ...] = (),
) -> nn.Module:
    """This rank's part of the transformer, with its tokens shared where the mesh says so."""
    component = folder / "transformer"
    config = model_class.load_config(component)
    mesh = placement.mesh
    recipe = LoadSpec(
        Checkpoint(component),
        mesh.tensor,
        placement.torch_dtype,
        placement.device,
        deltas=deltas,
        quantization=placement.quantization,
    )
    transformer = load_sharded(
        lambda: model_class.from_config(config), model_class._tp_plan, recipe
    )
    split_sequence(transformer, mesh.sequence)
    return transformer


def load_pipeline(folder: Path, placement: Placement) -> DiffusionPipeline:
    """diffusers' pipeline with its VAE and scheduler, and none of the large parts."""
    pipeline = DiffusionPipeline.from_pretrained(
        folder,
        transformer=None,
        text_encoder=None,
        tokenizer=None,
        dtype=placement.torch_dtype,
        use_safetensors=True,
        local_files_only=True,
    )
    return pipeline.to(placement.device)


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
