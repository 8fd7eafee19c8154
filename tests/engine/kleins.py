"""The embedded checkpoint as each kind of klein: tiers, folders and diffusers' own pipelines.

It was trained as a distilled klein; as the others it generates nonsense, but the same nonsense.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, Flux2KleinKVPipeline, Flux2KleinPipeline

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.tiny import KLEIN_CHECKPOINT

DISTILLED = tier_for("tiny")
BASE = replace(DISTILLED, family="flux2-klein-base", true_cfg_scale=4.0)
KV = replace(DISTILLED, family="flux2-klein-kv")
KLEINS = {"distilled": DISTILLED, "base": BASE, "KV": KV}

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    DISTILLED.family: Flux2KleinPipeline,
    BASE.family: Flux2KleinPipeline,
    KV.family: Flux2KleinKVPipeline,
}


def index_of(tier: Tier) -> dict[str, Any]:
    """The model_index.json of a checkpoint of the tier's family."""
    index = json.loads((KLEIN_CHECKPOINT / "model_index.json").read_text())
    del index["is_distilled"]
    index["_class_name"] = PIPELINES[tier.family].__name__
    if tier.family == KV.family:
        return index
    return index | {"is_distilled": tier.family == DISTILLED.family}


def save_klein(tier: Tier, folder: Path) -> Path:
    """The folder, which has the embedded checkpoint's parts under an index of its own."""
    for part in KLEIN_CHECKPOINT.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index_of(tier)))
    return folder


def negative_of(tier: Tier) -> str | None:
    """What a request of the tier steers away from, as the gateway fills it in."""
    return "" if tier.true_cfg_scale > 1 else None
