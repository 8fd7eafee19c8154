"""Random weights of a model's size, in files of diffusers' layout or made as they are read."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_ray.engine.flux2.empty_model import EmptyFlux2
from flux_ray.parallel.checkpoint import Checkpoint, Shard
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.mesh import Axis
from flux_ray.tiny import KLEIN_CHECKPOINT

# What has to stay free on the disk, since other programs write too.
RESERVE_BYTES = 2 * 10**9
# The prefix of names with which transformers saves the text model of a causal language model.
TEXT_PREFIX = "model."


class Skipped(Exception):
    """Raised, with the reason, where something cannot be measured on this machine."""


def random_tensor(name: str, shape: torch.Size, device: str) -> Tensor:
    """Return a random weight that depends on the name only, and ones for norms.

    Weights are scaled so that a layer's output is about as large as its input.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    dice = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return made.normal_(std=shape[-1] ** -0.5, generator=dice)


class MadeWeights(Checkpoint):
    """A module's checkpoint without files: weights are made on the device as a rank reads them."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__(Path("made"))
        self.device = device
        self.files = {name: self.folder for name, _ in saved_tensors(module)}

    @contextmanager
    def opened(self) -> Iterator["MadeWeights"]:
        """Yield itself: there is nothing to open."""
        yield self

    def read(self, name: str, shape: torch.Size, shard: Shard | None, axis: Axis) -> Tensor:
        """Return this rank's part of the tensor; `shape` is that of the whole tensor."""
        local = shape if shard is None else shard.local_shape(shape, axis)
        tensor = random_tensor(name, local, self.device)
        self.num_bytes_read += tensor.nbytes
        return tensor


def file_bytes(module: nn.Module) -> int:
    """Return the bytes of the module's checkpoint in bf16."""
    return sum(2 * tensor.numel() for _, tensor in saved_tensors(module))


def free_bytes(folder: Path) -> int:
    """Return how many bytes may be written to the folder's disk."""
    return max(shutil.disk_usage(folder).free - RESERVE_BYTES, 0)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise Skipped if the disk has no room for so many bytes."""
    free = free_bytes(folder)
    if num_bytes > free:
        raise Skipped(
            f"the files take {num_bytes / 1e9:.1f} GB, and the disk has room for {free / 1e9:.1f}"
        )


def groups_of(module: nn.Module, max_bytes: int) -> list[dict[str, torch.Size]]:
    """Return the shapes of the tensors, by name, for each file of at most `max_bytes`."""
    groups: list[dict[str, torch.Size]] = []
    room = 0
    for name, tensor in saved_tensors(module):
        num_bytes = 2 * tensor.numel()
        if num_bytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = tensor.shape
        room -= num_bytes
    return groups


def save_weights(
    module: nn.Module, folder: Path, *, device: str, max_bytes: int, prefix: str = ""
) -> None:
    """Save random weights for an empty module as files with an index, with one file in memory."""
    folder.mkdir(parents=True)
    groups, index = groups_of(module, max_bytes), {}
    for number, shapes in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {
            prefix + name: random_tensor(name, shape, device).cpu()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    weight_map = {"weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))


def save_transformer(model: EmptyFlux2, folder: Path, *, device: str, max_bytes: int) -> None:
    """Save the transformer's folder of a checkpoint."""
    save_weights(model.transformer, folder / "transformer", device=device, max_bytes=max_bytes)
    model.transformer.save_config(folder / "transformer")


def save_klein(model: EmptyFlux2, folder: Path, *, device: str, max_bytes: int) -> None:
    """Save a whole klein pipeline, with the scheduler and tokenizer of the embedded one."""
    check_room(folder.parent, sum(map(file_bytes, (model.transformer, model.text_encoder))))
    folder.mkdir()
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(KLEIN_CHECKPOINT / part, folder / part)
    shutil.copy(KLEIN_CHECKPOINT / "model_index.json", folder)
    save_transformer(model, folder, device=device, max_bytes=max_bytes)
    text = folder / "text_encoder"
    save_weights(model.text_encoder, text, device=device, max_bytes=max_bytes, prefix=TEXT_PREFIX)
    model.text_encoder.config.save_pretrained(text)
    vae = AutoencoderKLFlux2.from_config(dict(model.vae.config))
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that the next reader reads the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            # Pages that are not yet written to the disk cannot be dropped.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
