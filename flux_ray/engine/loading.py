"""Weights to modules: embedded, a folder, or a hub id with its revision; to each rank its part."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch import nn
from transformers.utils import logging as transformers_logging

from flux_ray.catalog.tiers import EMBEDDED, Tier
from flux_ray.config.tier import Lora, Quantization
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import Delta, LoadSpec, load_sharded
from flux_ray.parallel.mesh import Mesh
from flux_ray.parallel.precision import check_quantization
from flux_ray.parallel.sequence import check_heads, split_sequence
from flux_ray.tiny import CHECKPOINT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)")
# What to take of a checkpoint, as the hub names files. Its top folder has other copies of the
# weights, and `*.bin` runs code when it is read.
CONFIGS = ("model_index.json", "*/*.json")
PICTURE_PARTS = ("transformer/*.safetensors", "vae/*.safetensors")
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
