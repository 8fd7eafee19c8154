"""Load a checkpoint as modules, each rank only its own part.

Where it is, and how it gets there, is in flux_ray/weights/. The transformer, the text models and
the rest of the pipeline are loaded one by one, because each is split in its own way. Text models
are built without the layers that no family reads.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense
from transformers.utils import logging as transformers_logging

from flux_ray.config import Quantization, check_heads
from flux_ray.engine.api import Placement, TextModel
from flux_ray.engine.flow import check_scheduler
from flux_ray.parallel.checkpoint import Checkpoint, open_component
from flux_ray.parallel.load import Delta, LoadSpec, load_sharded
from flux_ray.parallel.lora import lora_deltas
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import check_quantization
from flux_ray.parallel.sequence import split_sequence
from flux_ray.weights import download
from flux_ray.weights.source import IMAGE_PARTS, WeightSource


def fetch(source: WeightSource, patterns: Iterable[str]) -> Path:
    """Return a local folder with the source's files that match, downloaded if they are not there.

    Progress is logged; the bars of several ranks would garble the logs.
    """
    hide_progress()
    return download.fetch(source, patterns)


def hide_progress() -> None:
    """Turn off the progress bars of the libraries."""
    disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a component's config.json, or another JSON file of that folder."""
    config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def check_class(index: dict[str, Any], pipeline: type[DiffusionPipeline], weights: str) -> None:
    """Raise ValueError unless the checkpoint was saved from this pipeline class.

    The checkpoint of another pipeline may load and then generate wrong images without any error.
    """
    name = index.get("_class_name")
    if name != pipeline.__name__:
        raise ValueError(f"weights {weights!r} are for {name}, not {pipeline.__name__}")


def check_transformer(folder: Path, placement: Placement) -> None:
    """Raise ValueError if the transformer cannot be split and quantized as `placement` says.

    It reads only the config, so that a bad setting does not cost the minutes of loading.
    """
    mesh, num_heads = placement.mesh, load_config(folder / "transformer")["num_attention_heads"]
    check_heads(num_heads, mesh.tensor.size, mesh.sequence.size)
    check_quantization(placement.quantization, mesh.tensor)


def load_transformer(
    model_class: Any,
    folder: Path,
    placement: Placement,
    deltas: tuple[Delta, ...] = (),
    change: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Load this rank's part of a diffusers transformer, `deltas` (LoRAs) added to its weights.

    With sequence ranks its forward takes and returns all tokens, and works on this rank's share.
    Before that, `change` may replace the attention that each of them computes for its heads.
    """
    component = folder / "transformer"
    config = model_class.load_config(component)
    mesh = placement.mesh
    recipe = LoadSpec(
        open_component(component, mesh.tensor),
        mesh.tensor,
        placement.torch_dtype,
        placement.device,
        deltas=deltas,
        quantization=placement.quantization,
    )
    transformer = load_sharded(
        lambda: model_class.from_config(config), model_class._tp_plan, recipe
    )
    if change is not None:
        change(transformer)
    split_sequence(transformer, mesh.sequence)
    return transformer


# Components of a pipeline that are loaded elsewhere, or not at all where they are shared.
APART = ("transformer", "text_encoder", "tokenizer")


def load_pipeline(
    folder: Path,
    placement: Placement,
    pipeline_class: type[DiffusionPipeline] = DiffusionPipeline,
) -> DiffusionPipeline:
    """Load diffusers' pipeline with only its VAE and scheduler, whole on every rank.

    It is of the checkpoint's own class, unless another one with the same parts is given.
    """
    index = load_config(folder, "model_index.json")
    absent: dict[str, Any] = {name: None for name in index if name.startswith(APART)}
    pipeline = pipeline_class.from_pretrained(
        folder,
        **absent,
        dtype=placement.torch_dtype,
        use_safetensors=True,
        local_files_only=True,
    )
    return pipeline.to(placement.device)


def load_parts(
    model_class: Any,
    source: WeightSource,
    placement: Placement,
    pipeline_class: type[DiffusionPipeline] = DiffusionPipeline,
    change: Callable[[nn.Module], None] | None = None,
) -> DiffusionPipeline:
    """Load a checkpoint's pipeline with this rank's part of the transformer, LoRAs added.

    For `pipeline_class` see `load_pipeline`, for `change` see `load_transformer`.
    """
    folder = fetch(source, IMAGE_PARTS)
    pipeline = load_pipeline(folder, placement, pipeline_class)
    check_scheduler(pipeline.scheduler)
    deltas = lora_deltas(placement.loras, type(pipeline), placement.device)
    transformer = load_transformer(model_class, folder, placement, deltas, change)
    pipeline.register_modules(transformer=transformer)
    return pipeline


# How to split T5 (version 1.1, with gates), since transformers has no plan for it. The position
# bias is an embedding [buckets, heads] of the first layer, which passes it on to all others.
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
T5_PLAN = {
    **{f"encoder.block.*.layer.0.SelfAttention.{name}": "colwise" for name in "qkv"},
    "encoder.block.*.layer.0.SelfAttention.o": "rowwise",
    T5_BIAS: "rowwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wo": "rowwise",
}


def first_layers(model_class: type[PreTrainedModel], config: Any, num_layers: int) -> TextModel:
    """Return the first layers of a decoder, as the later ones are never read.

    Its hidden_states[k] for k <= num_layers equal those of the whole model, bit for bit. Raise
    ValueError if the model has fewer layers.
    """
    if config.num_hidden_layers < num_layers:
        raise ValueError(
            f"a text encoder of {config.num_hidden_layers} layers has no hidden state {num_layers}"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        # transformers refuses to save a config with more types than layers. Mistral's has none.
        config.layer_types = config.layer_types[:num_layers]

    def build() -> PreTrainedModel:
        model = model_class(config)
        # transformers applies the norm to the last hidden state. In the whole model that is a later
        # layer's, so the norm must not touch the last one here.
        model.norm = nn.Identity()
        return model

    return TextModel(build, config.base_model_tp_plan, config.num_key_value_heads)


class T5FeedForward(T5DenseGatedActDense):
    """T5's MLP whose weights may be of 4 bits.

    transformers casts the activations to the dtype in which `wo` is stored. Of NF4 that is uint8,
    which leaves nothing of them.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP's output, [..., width] in the dtype of the hidden states."""
        gated = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        output: Tensor = self.wo(gated)
        return output


def t5(folder: Path) -> TextModel:
    """Return FLUX.1's T5 encoder with all of its layers, from the config in `folder`."""
    return t5_of(T5Config.from_pretrained(folder))


def t5_of(config: T5Config) -> TextModel:
    """Return a T5 encoder of the shape that `config` says."""

    def build() -> PreTrainedModel:
        model = T5EncoderModel(config)
        # One module under two names: the checkpoint has its weight only once.
        model.encoder.embed_tokens = model.shared
        for module in model.modules():
            if type(module) is T5DenseGatedActDense:
                module.__class__ = T5FeedForward
        # diffusers asks every module of a plan for its bias, and an embedding has none.
        model.get_submodule(T5_BIAS).bias = None  # type: ignore[assignment]
        return model

    return TextModel(build, T5_PLAN, config.num_heads, "shared.weight", folder="text_encoder_2")


def encoder_axis(num_heads: int, mesh: Mesh, quantization: Quantization | None = None) -> Axis:
    """Return the axis over which a text encoder is split.

    It is all ranks of the replica if their number divides the heads, else the tensor axis; raise
    ValueError if neither does. 4-bit weights cannot be cut: for nf4 only the tensor axis counts,
    which must then have size 1, so that every sequence rank holds the whole encoder.
    """
    for axis in (mesh.tensor,) if quantization == "nf4" else (mesh.world, mesh.tensor):
        if num_heads % axis.size == 0:
            return axis
    raise ValueError(
        f"parallel.tensor {mesh.tensor.size} does not divide the text encoder's {num_heads} heads"
        " (of keys and values)"
    )


def prefix_in(checkpoint: Checkpoint, embedding: str) -> str:
    """Return what the checkpoint puts before the model's own parameter names.

    A whole model's checkpoint may name the text part `language_model.model.` or the like. Raise
    ValueError unless exactly one of its tensors is the embedding.
    """
    found = [name for name in checkpoint.files if f".{name}".endswith(f".{embedding}")]
    if len(found) != 1:
        raise ValueError(f"{checkpoint.folder} has {len(found)} tensors named {embedding}")
    return found[0].removesuffix(embedding)


def load_text_model(model: TextModel, folder: Path, placement: Placement) -> nn.Module:
    """Load this rank's part of the text model from the component's folder."""
    quantization = placement.encoder_quantization
    axis = encoder_axis(model.num_heads, placement.mesh, quantization)
    checkpoint = open_component(folder, axis)
    recipe = LoadSpec(
        checkpoint,
        axis,
        placement.torch_dtype,
        placement.device,
        prefix=prefix_in(checkpoint, model.embedding),
        # The checkpoint has later layers, and perhaps a vision tower, that are left out on purpose.
        whole=False,
        quantization=quantization,
    )
    return load_sharded(model.build, model.plan, recipe)
