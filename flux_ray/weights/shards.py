"""The manifest of a folder that `flux-ray weights shard` made, and what a tier must say to use it.

Such a folder has the layout of a checkpoint, but in place of the weights of the transformer and the
text encoder a file for each rank, with the slices that this rank would cut out of them.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from flux_ray.config import Args, TierArgs
from flux_ray.weights.source import WeightsUnavailable

MANIFEST = "flux-ray-shards.json"


class ShardFile(Args):
    """A file of the folder: its bytes and their checksum."""

    num_bytes: int
    sha256: str


class ShardManifest(Args):
    """What a folder of rank files was made from, and for which layout.

    `source`: the checkpoint, with its revision if it came from a hub. `num_ranks`: into how many
    files each component is split. `files`: all files that were written, by their path.
    """

    format_version: Literal[1] = 1
    flux_ray: str
    tier: str
    source: str
    tensor: int = Field(ge=1)
    sequence: int = Field(ge=1)
    text_encoder: Literal["colocated", "shared"]
    num_ranks: dict[str, int]
    files: dict[str, ShardFile]


def rank_file(rank: int, num_ranks: int) -> str:
    """Return the name of a rank's file of a component."""
    return f"rank-{rank}-of-{num_ranks}.safetensors"


def read_manifest(folder: Path) -> ShardManifest | None:
    """Return the folder's manifest, or None if its checkpoint is whole.

    Raise WeightsUnavailable if this version of flux-ray does not understand the manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return ShardManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "its text"
        raise WeightsUnavailable(
            f"{path} is not as this version of flux-ray writes it ({key}: {first['msg']}): split"
            " the weights anew with `flux-ray weights shard`"
        ) from None


def check_parallel(folder: Path, manifest: ShardManifest, args: TierArgs) -> None:
    """Raise WeightsUnavailable if the tier's ranks need other slices than the folder has.

    For the text encoder, whose split depends on its heads too, `open_component` makes sure.
    """
    if manifest.tensor != args.parallel.tensor:
        raise WeightsUnavailable(
            f"the folder {folder} is split for parallel.tensor {manifest.tensor}, and the tier has"
            f" {args.parallel.tensor}: change `parallel`, or run `flux-ray weights shard"
            f" {args.tier} --tensor {args.parallel.tensor}`"
        )
