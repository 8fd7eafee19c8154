"""A checkpoint in klein's layout that three ranks can split, with random weights."""

import shutil
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from flux_ray.tiny import KLEIN_CHECKPOINT

NUM_HEADS = 6
HEAD_DIM = 16


def save_random_klein(folder: Path) -> None:
    """Save the embedded checkpoint with 6 heads, since its own number cannot be divided by 3."""
    shutil.copytree(KLEIN_CHECKPOINT, folder)
    torch.manual_seed(0)
    text = Qwen3Config.from_pretrained(KLEIN_CHECKPOINT / "text_encoder")
    text.num_attention_heads, text.num_key_value_heads = NUM_HEADS, NUM_HEADS // 2
    text.intermediate_size = 96
    Qwen3ForCausalLM(text).save_pretrained(folder / "text_encoder")
    config = Flux2Transformer2DModel.load_config(KLEIN_CHECKPOINT / "transformer")
    changed = {
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    transformer = Flux2Transformer2DModel.from_config({**config, **changed})
    transformer.save_pretrained(folder / "transformer")
