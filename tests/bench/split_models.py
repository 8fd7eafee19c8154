"""The models that are split: random weights, their inputs, and the outputs to expect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from flux_ray.engine.loading import T5_BIAS

# 300,419,072 parameters, half as wide as klein-4b.
MID = {
    "in_channels": 128,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 12,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
# As deep as dev, but so narrow that only the host's own work takes time.
DEV_DEPTH = {
    "in_channels": 16,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
# 197,160,960 parameters. The first 9 of 12 layers are used, as of Qwen3-8B the first 27 of 36.
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
TEXT_LAYERS = (3, 6, 9)
# 91,245,696 parameters: T5 1.1 of its size "base" with fewer words. FLUX.1's is of the size "XXL".
T5 = {
    "vocab_size": 8192,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def inputs_for(config: dict[str, Any], num_image: int, num_text: int) -> dict[str, Any]:
    """Return the keyword arguments of a forward of that transformer."""
    dice = torch.Generator().manual_seed(1)
    text_width = config["joint_attention_dim"]
    return {
        "hidden_states": torch.randn(1, num_image, config["in_channels"], generator=dice),
        "encoder_hidden_states": torch.randn(1, num_text, text_width, generator=dice),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randint(0, 9, (1, num_image, 4), generator=dice),
        "txt_ids": torch.randint(0, 9, (1, num_text, 4), generator=dice),
    }


MID_INPUTS = inputs_for(MID, num_image=192, num_text=64)
DEV_INPUTS = inputs_for(DEV_DEPTH, num_image=4, num_text=4)
TEXT_INPUTS = {
    "input_ids": torch.randint(0, 8192, (1, 512), generator=torch.Generator().manual_seed(1)),
    "output_hidden_states": True,
    "use_cache": False,
}


def text_states(model: Any) -> list[Tensor]:
    """Return the hidden states of a forward that become the prompt's embedding."""
    states = model(**TEXT_INPUTS).hidden_states
    return [states[layer] for layer in TEXT_LAYERS]


# What the outputs of each model are, by the folder of its checkpoint.
FORWARDS: dict[str, Callable[[Any], list[Tensor]]] = {
    "mid": lambda model: [model(**MID_INPUTS).sample],
    "text": text_states,
    "t5": lambda model: [model(TEXT_INPUTS["input_ids"]).last_hidden_state],
}


def num_split_linears(config: dict[str, Any]) -> int:
    """Return how many linears are split.

    A double block has q, k, v, out and two of the MLP for each stream, a single block has two.
    """
    return 12 * config["num_layers"] + 2 * config["num_single_layers"]


def num_row_parallel(config: dict[str, Any]) -> int:
    """Return the least number of all-reduces in a forward.

    There is one for attention and one for the MLP of each stream of a double block, and one for a
    single block.
    """
    return 4 * config["num_layers"] + config["num_single_layers"]


def least_bytes(config: dict[str, Any], inputs: dict[str, Any]) -> int:
    """Return the bytes of a forward's row-parallel outputs, fp32 [tokens of the stream, width]."""
    num_tokens = inputs["img_ids"].shape[1] + inputs["txt_ids"].shape[1]
    width = config["attention_head_dim"] * config["num_attention_heads"]
    return 4 * (2 * config["num_layers"] + config["num_single_layers"]) * num_tokens * width


@torch.no_grad()
def save_models(root: Path) -> dict[str, list[Tensor]]:
    """Write the checkpoints, and return the outputs of the whole models in one process."""
    torch.manual_seed(0)
    Flux2Transformer2DModel(**DEV_DEPTH).save_pretrained(root / "dev_depth")
    model = Flux2Transformer2DModel(**MID).eval()
    model.save_pretrained(root / "mid", max_shard_size="400MB")
    text = Qwen3Model(Qwen3Config(**TEXT)).eval()
    text.save_pretrained(root / "text")
    models = {"mid": model, "text": text, "t5": save_t5(root / "t5")}
    return {name: FORWARDS[name](each) for name, each in models.items()}


def save_t5(folder: Path) -> T5EncoderModel:
    """Write T5's checkpoint, and return the model."""
    t5 = T5EncoderModel(T5Config(**T5)).eval()
    # It begins so small that it would not show which heads it is of.
    torch.nn.init.normal_(t5.get_submodule(T5_BIAS).weight)
    t5.save_pretrained(folder)
    return t5
