"""Say where a tier's weights are, and which files of a checkpoint are used.

Weights are an embedded checkpoint, a folder, or a hub id with its revision. The patterns of files
are here alone: what a start downloads, what `flux-ray weights pull` downloads and what is verified
cannot differ.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flux_ray.catalog import EMBEDDED, EMBEDDED_KONTEXT, Tier
from flux_ray.tiny import KLEIN_CHECKPOINT, KONTEXT_CHECKPOINT

IN_PACKAGE = {EMBEDDED: str(KLEIN_CHECKPOINT), EMBEDDED_KONTEXT: str(KONTEXT_CHECKPOINT)}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
# The index in the top folder of a checkpoint, in diffusers' layout of pipelines or of modular ones.
INDEXES = ("model_index.json", "modular_model_index.json")
# Which files of a checkpoint to download, as hub patterns. Not the top folder, which has the
# weights a second time, and no `*.bin`, which may run code when it is loaded.
CONFIGS = (*INDEXES, "*/*.json")
IMAGE_PARTS = ("transformer/*.safetensors", "vae/*.safetensors")
PROMPT_PARTS = (
    "text_encoder/*.safetensors",
    "text_encoder_2/*.safetensors",
    *(
        f"{folder}/*.{ending}"
        for folder in ("tokenizer", "tokenizer_2")
        for ending in ("txt", "jinja", "model")
    ),
)
ALL_PARTS = (*CONFIGS, *IMAGE_PARTS, *PROMPT_PARTS)


class WeightsUnavailable(ValueError):
    """Weights that cannot be had as the configuration stands; the message says what to do."""


class HubUnreachable(WeightsUnavailable):
    """Weights that are not on this machine, of a hub that it cannot ask: another one may."""


@dataclass(frozen=True)
class WeightSource:
    """The place of a checkpoint: a hub repository if there is a revision, else a local folder."""

    location: str
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Return whether it is a hub's commit, which never changes, unlike a branch."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


def weights_of(tier: Tier, weights: str | None) -> str:
    """Return the operator's weights or else the catalogue's; raise ValueError without either."""
    chosen = weights or tier.weights
    if chosen is None:
        raise ValueError(f"tier {tier.name} needs weights")
    return chosen


def source_for(weights: str) -> WeightSource:
    """Return the source that a config's `weights` names.

    Raise WeightsUnavailable, which says what may be written, if it is neither of the possible
    kinds.
    """
    weights = IN_PACKAGE.get(weights, weights)
    if weights and Path(weights).is_dir():
        return WeightSource(weights)
    if match := HUB_ID.fullmatch(weights):
        return WeightSource(match["repository"], match["revision"])
    raise WeightsUnavailable(
        f"weights {weights!r}: neither an existing folder nor a hub id with its revision"
        " (owner/name@revision)"
    )
