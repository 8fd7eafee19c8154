"""Carry an encoded prompt between processes: from a shared text encoder to the ranks."""

import torch
from torch import Tensor

from flux_ray.engine.api import PromptEmbeds
from flux_ray.stages import EncodedPrompt, PackedTensor


def pack(prompt: PromptEmbeds) -> EncodedPrompt:
    """Return an encoded prompt as plain bytes for another process."""
    tensors = tuple((name, packed(tensor)) for name, tensor in prompt.tensors.items())
    return EncodedPrompt(tensors, prompt.warnings)


def packed(tensor: Tensor) -> PackedTensor:
    """Return the tensor's bytes; they are taken as uint8, because NumPy has no bfloat16."""
    tensor = tensor.cpu().contiguous()
    data = tensor.view(torch.uint8).numpy().tobytes()
    return PackedTensor(data, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def unpack(encoded: EncodedPrompt, device: str) -> PromptEmbeds:
    """Return the prompt that was packed, bit for bit, on `device`."""
    tensors = {name: unpacked(tensor).to(device) for name, tensor in encoded.tensors}
    return PromptEmbeds(tensors, encoded.warnings)


def unpacked(tensor: PackedTensor) -> Tensor:
    """Return the tensor on the CPU."""
    # A bytearray is a copy: torch warns that a tensor over immutable bytes could be written to.
    flat = torch.frombuffer(bytearray(tensor.data), dtype=getattr(torch, tensor.dtype))
    return flat.reshape(tensor.shape)
