"""Small transformers of both families with random weights, saved in several files, and inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

torch.set_num_threads(1)

FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 8,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": True,
}
FLUX1 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 8,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FAMILIES = {"flux2": (Flux2Transformer2DModel, FLUX2), "flux1": (FluxTransformer2DModel, FLUX1)}


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`transformer_folder("flux2")`: its checkpoint, over several files with an index."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model_class, config = FAMILIES[family]
            torch.manual_seed(0)
            model = model_class(**config)
            # Biases and norms begin as constants, which hide a wrong slice.
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(made[family], max_shard_size="200KB")
        return made[family]

    return folder


@pytest.fixture(scope="session")
def transformer_inputs() -> Callable[..., dict[str, Any]]:
    """`transformer_inputs("flux2", num_image=23, num_text=7)`: keyword arguments for a forward."""

    def inputs(family: str, num_image: int = 23, num_text: int = 7) -> dict[str, Any]:
        dice = torch.Generator().manual_seed(1)
        num_axes = len(FAMILIES[family][1]["axes_dims_rope"])
        ids = (
            torch.randint(0, 9, (num, num_axes), generator=dice) for num in (num_image, num_text)
        )
        img_ids, txt_ids = (part[None] if family == "flux2" else part for part in ids)
        inputs = {
            "hidden_states": torch.randn(1, num_image, 16, generator=dice),
            "encoder_hidden_states": torch.randn(1, num_text, 48, generator=dice),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([4.0]),
            "img_ids": img_ids,
            "txt_ids": txt_ids,
        }
        if family == "flux1":
            inputs["pooled_projections"] = torch.randn(1, 24, generator=dice)
        return inputs

    return inputs
