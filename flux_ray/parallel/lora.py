"""Read the operator's LoRA files, and add them to a rank's slices while these are loaded.

diffusers converts the many formats of LoRA files. It may silently leave out what it does not know,
so that every tensor of a file is accounted for here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ray.config import Lora
from flux_ray.parallel.checkpoint import Shard
from flux_ray.parallel.mesh import Axis

PREFIX = "transformer."
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a weight [out, in]: scale * up [out, rank] @ down [rank, in], in fp32."""

    up: Tensor
    down: Tensor
    scale: float

    def part(self, shard: Shard | None, axis: Axis) -> Tensor:
        """Return what is added to this rank's part of the weight, fp32 of that part's shape.

        Only one factor has to be sliced: rows of the weight come from `up`, columns from `down`.
        """
        up, down = self.up, self.down
        if shard is not None and shard.dim == 0:
            up = shard.take(up, axis)
        elif shard is not None:
            down = shard.take(down, axis)
        return self.scale * up @ down


@dataclass(frozen=True)
class LoraDelta:
    """One LoRA file: its factors by the names of the weights that it changes."""

    path: str
    factors: Mapping[str, LowRank]

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise ValueError if a factor has no weight of its shape in the transformer."""
        for name, factor in self.factors.items():
            key = PREFIX + name.removesuffix(".weight")
            if name not in shapes:
                raise ValueError(f"lora {self.path}: {key} targets nothing in the transformer")
            shape = (factor.up.shape[0], factor.down.shape[1])
            if shape != shapes[name]:
                raise ValueError(
                    f"lora {self.path}: {key} is for a weight of the shape {shape}, but the"
                    f" transformer's has {tuple(shapes[name])}"
                )

    def __call__(self, name: str, shard: Shard | None, axis: Axis) -> Tensor | None:
        factor = self.factors.get(name)
        return None if factor is None else factor.part(shard, axis)


def lora_deltas(
    loras: Sequence[Lora], pipeline_class: Any, device: str = "cpu"
) -> tuple[LoraDelta, ...]:
    """Read each LoRA of the list, in any format that the diffusers pipeline knows, onto `device`.

    Raise ValueError, with the file and the key, if a file is unreadable or changes anything but
    weights of the transformer.
    """
    return tuple(LoraDelta(lora.path, read_factors(lora, pipeline_class, device)) for lora in loras)


def read_factors(lora: Lora, pipeline_class: Any, device: str) -> dict[str, LowRank]:
    """Return the factors of a LoRA file by weight name, scaled as file and operator say."""
    raw, metadata = read_file(lora.path)
    refuse_lost(lora.path, raw, pipeline_class)
    factors = {}
    for module, parts in group(lora.path, convert(lora.path, raw, pipeline_class)).items():
        down, up = (parts[leaf].to(device, torch.float32) for leaf in (DOWN, UP))
        alpha = parts[ALPHA].item() if ALPHA in parts else None
        scale = scale_of(module, down.shape[0], alpha, metadata)
        factors[f"{module}.weight"] = LowRank(up, down, lora.scale * scale)
    return factors


def read_file(path: str) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a safetensors file, and its LoRA metadata from diffusers or peft."""
    if not Path(path).is_file():
        raise ValueError(f"lora {path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"lora {path} is not a safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"lora {path} has no tensors")
    return tensors, json.loads(noted)


def convert(path: str, raw: Tensors, pipeline_class: Any) -> Tensors:
    """Return the same factors under diffusers' names, alphas included.

    Raise ValueError if diffusers cannot read them, whatever its own error is.
    """
    try:
        converted = pipeline_class.lora_state_dict(dict(raw), return_alphas=True)
    except (AssertionError, LookupError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"lora {path} cannot be read by diffusers: {error!r}") from error
    # FLUX.1's pipeline returns the alphas separately, FLUX.2's leaves them among the tensors.
    tensors, alphas = converted if isinstance(converted, tuple) else (converted, None)
    names: Tensors = convert_unet_state_dict_to_peft({**tensors, **(alphas or {})})
    return names


def refuse_lost(path: str, raw: Tensors, pipeline_class: Any) -> None:
    """Raise ValueError if diffusers would leave out a tensor of the file.

    diffusers drops what it does not know, at most with a line in the log, and the images would then
    be wrong without any error. To find such tensors, a copy of the file is converted in which each
    is filled with a number of its own; a number that is missing in the result was dropped.
    """
    numbers = {key: float(n) for n, key in enumerate(raw, 1) if not key.endswith(ALPHA)}
    numbered = {key: torch.full(raw[key].shape, number) for key, number in numbers.items()}
    for key in raw.keys() - numbers.keys():
        # The conversion may multiply the factors by alpha / rank, which would change their numbers.
        # With alpha equal to the rank it multiplies by 1.
        module = key.removesuffix(ALPHA)
        downs = (k for k in raw if k.startswith(f"{module}.") and re.search("down|lora_A", k))
        ranks = [len(raw[down]) for down in downs]
        if not ranks:
            raise ValueError(f"lora {path}: {key} belongs to no factor")
        numbered[key] = torch.tensor(float(ranks[0]))
    arrived = set()
    for tensor in convert(path, numbered, pipeline_class).values():
        # A fused tensor is made of several blocks, along rows or columns: the first row and the
        # first column cross all of them.
        matrix = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
        arrived |= {*matrix[0].tolist(), *matrix[:, 0].tolist()}
    for key, number in numbers.items():
        if number not in arrived:
            raise ValueError(f"lora {path}: {key} is nothing that diffusers can place")


def group(path: str, tensors: Tensors) -> dict[str, Tensors]:
    """Group the tensors by the module that they change: both factors, and alpha if there is one.

    Raise ValueError for a tensor that is no factor of the transformer, or for half of a pair.
    """
    modules: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in (DOWN, UP, ALPHA) if key.endswith(leaf)), None)
        if leaf is None or not key.startswith(PREFIX):
            raise ValueError(f"lora {path}: {key} is no factor of a weight of the transformer")
        module = key.removeprefix(PREFIX).removesuffix(leaf)
        modules.setdefault(module, {})[leaf] = tensor
    for module, parts in modules.items():
        if not {DOWN, UP} <= parts.keys():
            raise ValueError(f"lora {path}: {PREFIX}{module} has not both factors")
    return modules


def scale_of(module: str, rank: int, alpha: float | None, metadata: Mapping[str, Any]) -> float:
    """Return the scale of a module's factors, alpha / rank, or 1 if the file has no alpha.

    Alpha comes from the file's tensors or else from its metadata, peft's LoraConfig, which may have
    another value for some modules. Rank-stabilised LoRAs divide by the square root of the rank.
    """
    if alpha is not None:
        return alpha / rank
    patterns = metadata.get(f"{PREFIX}alpha_pattern", {})
    special = (patterns[key] for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module))
    noted = next(special, metadata.get(f"{PREFIX}lora_alpha", rank))
    divisor = math.sqrt(rank) if metadata.get(f"{PREFIX}use_rslora") else rank
    return float(noted / divisor)
