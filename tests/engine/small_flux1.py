"""Checkpoints in exactly the layouts of FLUX.1's kinds, with random weights: a megabyte each."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LATENT_CHANNELS = 4
# Of the latents of 2 x 2 pixels, and the 8 x 8 pixels of a mask under each of them.
NUM_LATENTS, NUM_MARKS = 4 * LATENT_CHANNELS, 4 * 64
SHIFTS = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
DEV_SCHEDULE: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, **SHIFTS}
SCHNELL_SCHEDULE: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False, **SHIFTS}
KINDS: dict[str, tuple[type[DiffusionPipeline], int, bool, dict[str, Any]]] = {
    "dev": (FluxPipeline, NUM_LATENTS, True, DEV_SCHEDULE),
    "schnell": (FluxPipeline, NUM_LATENTS, False, SCHNELL_SCHEDULE),
    "kontext": (FluxKontextPipeline, NUM_LATENTS, True, DEV_SCHEDULE),
    "fill": (FluxFillPipeline, 2 * NUM_LATENTS + NUM_MARKS, True, DEV_SCHEDULE),
    "control": (FluxControlPipeline, 2 * NUM_LATENTS, True, DEV_SCHEDULE),
}


def randomized(module: torch.nn.Module, std: float) -> Any:
    """Biases and norms begin as constants, which hide a wrong slice."""
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=std)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module


def build_clip_tokenizer() -> CLIPTokenizer:
    """One token for each byte, in two forms: inside of a word and at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (*alphabet, *(f"{letter}</w>" for letter in alphabet))
    vocabulary = {word: number for number, word in enumerate(words)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def build_t5_tokenizer() -> T5Tokenizer:
    """One token for each letter, and one for each word of the tests' prompts."""
    letters = string.ascii_letters + string.digits + string.punctuation
    words = ("a", "the", "red", "circle", "on", "blue", "background", "green", "star")
    special = (("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0))
    vocabulary = [
        *special,
        *((letter, -3.0) for letter in letters),
        *((f"▁{word}", -4.0) for word in words),
    ]
    return T5Tokenizer(vocab=vocabulary, model_max_length=512)


def build_clip(vocabulary_size: int) -> CLIPTextModel:
    """With CLIP's real `eos_token_id`, which makes it pool at the largest token."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return randomized(CLIPTextModel(config), 0.1)


def build_t5(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return randomized(T5EncoderModel(config), 0.2)


def build_vae() -> AutoencoderKL:
    """8 x 8 pixels to 4 channels; tiles, where it is told to tile, of 64 x 64 pixels."""
    return randomized(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=64,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        0.2,
    )


def build_transformer(in_channels: int, guidance_embeds: bool) -> FluxTransformer2DModel:
    """Width 64: four heads of 16."""
    return randomized(
        FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=NUM_LATENTS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        0.1,
    )


def save_small_flux1(folder: Path, kind: str) -> None:
    """Write the directory of the kind's pipeline in fp32, the transformer over several files."""
    torch.manual_seed(0)
    pipeline, in_channels, guidance_embeds, schedule = KINDS[kind]
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=build_vae(),
        text_encoder=build_clip(len(clip_tokenizer)),
        tokenizer=clip_tokenizer,
        # Room for what it says besides the words above.
        text_encoder_2=build_t5(len(t5_tokenizer) + 4),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(in_channels, guidance_embeds),
    ).save_pretrained(folder, max_shard_size="300KB")
