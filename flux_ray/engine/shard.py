"""Split a checkpoint into a file for each rank, once, so that no rank reads what others hold.

Slices along the rows of a file let the disk read the whole tensor, or on network storage the
network: a rank's own file has only its bytes. The slices are cut by the code that loads a whole
checkpoint, so that what is loaded is equal bit for bit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from flux_ray import __version__
from flux_ray.catalog import Tier
from flux_ray.config import Parallel, check_heads
from flux_ray.engine.loading import encoder_axis, load_config, prefix_in
from flux_ray.engine.registry import empty_model
from flux_ray.parallel.checkpoint import Checkpoint, shards_for
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.weights.hub import is_complete, is_used, snapshot_of
from flux_ray.weights.shards import (
    MANIFEST,
    ShardFile,
    ShardManifest,
    rank_file,
    read_manifest,
)
from flux_ray.weights.source import (
    ALL_PARTS,
    WeightSource,
    WeightsUnavailable,
    source_for,
    weights_of,
)


@dataclass(frozen=True)
class Component:
    """A part of a model that is split over ranks: its module on the meta device, and its files.

    `prefix`: what the checkpoint puts before the module's own parameter names.
    """

    name: str
    module: nn.Module
    plan: Mapping[str, Any]
    num_ranks: int
    prefix: str = ""


def write_shards(
    tier: Tier,
    weights: str | None,
    parallel: Parallel,
    text_encoder: Literal["colocated", "shared"],
    to: Path,
    say: Callable[[str], None],
) -> ShardManifest:
    """Write the rank files of a checkpoint that is on this machine, with their manifest, to `to`.

    It takes the memory of one rank's part of one component. `say` is told of every file. Raise
    ValueError if the weights are not here or cannot be split so, and before anything is written.
    """
    source = source_for(weights_of(tier, weights or tier.hub_id))
    folder = whole_checkpoint(source)
    if to.exists():
        raise ValueError(f"there is already {to}: name a folder that is not there")
    components = components_of(tier, folder, parallel, text_encoder)
    # Only a folder that is whole gets the name.
    partial = to.with_name(f"{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_rest(folder, partial, {component.name for component in components})
    for component in components:
        for rank in range(component.num_ranks):
            path = write_rank(component, rank, folder, partial)
            say(f"{component.name}/{path.name}: {path.stat().st_size / 1e9:.2f} GB")
    manifest = ShardManifest(
        flux_ray=__version__,
        tier=tier.name,
        source=str(source),
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        text_encoder=text_encoder,
        num_ranks={component.name: component.num_ranks for component in components},
        files=dict(files_in(partial)),
    )
    (partial / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1))
    partial.rename(to)
    return manifest


def whole_checkpoint(source: WeightSource) -> Path:
    """Return the folder of a checkpoint; raise WeightsUnavailable unless it is whole, and here."""
    if source.revision is not None and not is_complete(source, ALL_PARTS):
        raise WeightsUnavailable(
            f"{source} is not whole on this machine: run `flux-ray weights pull {source}` first"
        )
    folder = Path(source.location) if source.revision is None else snapshot_of(source)
    if read_manifest(folder) is not None:
        raise WeightsUnavailable(f"{folder} is split already: name the whole checkpoint")
    return folder


def components_of(
    tier: Tier, folder: Path, parallel: Parallel, text_encoder: Literal["colocated", "shared"]
) -> list[Component]:
    """Return the components to split; raise ValueError if they do not divide by these ranks."""
    model = empty_model(tier, str(folder))
    num_heads = load_config(folder / "transformer")["num_attention_heads"]
    check_heads(num_heads, parallel.tensor, parallel.sequence)
    mesh = Mesh()
    if text_encoder == "colocated":
        # The places of ranks that are not there, as in plans.
        sizes = (parallel.num_ranks, parallel.tensor, parallel.sequence)
        mesh = Mesh(*(Axis(0, size) for size in sizes))
    text_model = model.text_model
    prefix = prefix_in(Checkpoint(folder / text_model.folder), text_model.embedding)
    num_ranks = encoder_axis(text_model.num_heads, mesh).size
    components = [
        Component(
            "transformer", model.transformer, type(model.transformer)._tp_plan, parallel.tensor
        ),
        Component(text_model.folder, model.text_encoder, text_model.plan, num_ranks, prefix),
    ]
    for component in components:
        # What cannot be divided is found here.
        shards_for(component.module, component.plan, component.num_ranks)
    return components


def write_rank(component: Component, rank: int, folder: Path, to: Path) -> Path:
    """Write the file of one rank: its slices in the checkpoint's own dtype; return its path."""
    axis = Axis(rank, component.num_ranks)
    shards = shards_for(component.module, component.plan, axis.size)
    with Checkpoint(folder / component.name).opened() as checkpoint:
        tensors = {
            f"{component.prefix}{name}": checkpoint.read(
                f"{component.prefix}{name}", tensor.shape, shards.get(name), axis
            )
            for name, tensor in saved_tensors(component.module)
        }
        path = to / component.name / rank_file(rank, axis.size)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return path


def copy_rest(folder: Path, to: Path, components: set[str]) -> None:
    """Copy what no rank splits: configs, tokenizers, scheduler, VAE, and a small text encoder."""
    split = tuple(f"{name}/*.safetensors*" for name in components)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # In a folder of a pull, `.cache` has the hub's own files.
        is_own = name.startswith(".") or is_used(name, split)
        if path.is_file() and is_used(name, ALL_PARTS) and not is_own:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / name)


def files_in(folder: Path) -> Iterator[tuple[str, ShardFile]]:
    """Yield the path of each file, with its bytes and their checksum."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield (
                path.relative_to(folder).as_posix(),
                ShardFile(num_bytes=path.stat().st_size, sha256=digest),
            )
