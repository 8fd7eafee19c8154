"""Weights to a diffusers pipeline: embedded, a folder, or a hub id with its revision."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from flux_ray.catalog import EMBEDDED
from flux_ray.tiny import CHECKPOINT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)")


@dataclass(frozen=True)
class Source:
    """Where weights come from; a revision means the hub, none a folder."""

    location: str
    revision: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for diffusers; a folder never reaches for the network."""
        if self.revision is None:
            return {"local_files_only": True}
        return {"revision": self.revision}


@dataclass(frozen=True)
class Placement:
    """How and where the weights are held."""

    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]


def source_for(weights: str) -> Source:
    """The source that a config's `weights` names; ValueError says what may be written."""
    if weights == EMBEDDED:
        weights = str(CHECKPOINT)
    if weights and Path(weights).is_dir():
        return Source(weights)
    if match := HUB_ID.fullmatch(weights):
        return Source(match["repository"], match["revision"])
    raise ValueError(
        f"weights {weights!r}: neither an existing folder nor a hub id with its revision"
        " (owner/name@revision)"
    )


def load_model_index(source: Source) -> dict[str, Any]:
    """The checkpoint's model_index.json, read before any weight is."""
    index: dict[str, Any] = DiffusionPipeline.load_config(source.location, **source.options)
    return index


def load_pipeline(source: Source, placement: Placement) -> DiffusionPipeline:
    """The pipeline with its weights in place; only safetensors files are read."""
    # They would draw over each other in the ranks' logs.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pipeline = DiffusionPipeline.from_pretrained(
        source.location,
        dtype=DTYPES[placement.dtype],
        use_safetensors=True,
        **source.options,
    )
    return pipeline.to(placement.device)
