"""Small checkpoints in FLUX.3's two layouts, with random weights: a megabyte each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 300
# Qwen's, for one message of text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content +"
    " '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
CLASSES = {True: "Flux3DistilledModularPipeline", False: "Flux3ModularPipeline"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens; pads on the left, unless it is told otherwise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red circle on a blue background"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_text_encoder() -> Qwen3VLForConditionalGeneration:
    """One layer more than is used, and a vision tower that never is."""
    text = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 33,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 8,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


def build_vae() -> AutoencoderKLFlux2:
    """8 x 8 pixels to 8 channels; tiles, where it is told to tile, of 64 x 64 pixels."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def build_transformer(flow_map: bool) -> Flux3Transformer2DModel:
    """Width 64: four heads of 16."""
    transformer = Flux3Transformer2DModel(
        in_channels=32,
        cond_in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=256,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )
    # Norms begin as constants, which hide a wrong slice.
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def save_small(folder: Path, flow_map: bool) -> None:
    """Write a checkpoint in fp32, the transformer over several files."""
    torch.manual_seed(0)
    build_vae().save_pretrained(folder / "vae")
    build_text_encoder().save_pretrained(folder / "text_encoder")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    build_transformer(flow_map).save_pretrained(folder / "transformer", max_shard_size="300KB")
    index = {"_class_name": CLASSES[flow_map], "_diffusers_version": "0.42.1"}
    (folder / "modular_model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def small_flux3(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`small_flux3("flux-3-klein")`: the folder of a small checkpoint of that tier."""
    made: dict[str, Path] = {}

    def folder(tier: str) -> Path:
        if tier not in made:
            made[tier] = tmp_path_factory.mktemp(tier)
            save_small(made[tier], flow_map=tier == "flux-3-klein")
        return made[tier]

    return folder
