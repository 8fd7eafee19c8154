"""Build the parts of the tiny model: klein's own classes with small dimensions, and a tokenizer."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from flux_ray.tiny import world
from flux_ray.tiny.tasks import draw_corpus

LATENT_CHANNELS = 8
VOCABULARY_SIZE = 448
HIDDEN_SIZE = 64
# The hidden states that Flux2KleinPipeline joins into prompt embeddings, with its defaults.
OUTPUT_LAYERS = (9, 18, 27)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def build_vae() -> AutoencoderKLFlux2:
    """Build the untrained VAE, 0.7 M parameters.

    It encodes 8 x 8 pixels into 8 channels, so a token of 16 x 16 pixels has 32.
    """
    return AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # One group: with groups of two channels the reconstruction stalled.
        norm_num_groups=1,
        sample_size=world.SIDE,
    )


def build_transformer() -> Flux2Transformer2DModel:
    """Build the untrained transformer, 2.5 M parameters and 128 wide."""
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=len(OUTPUT_LAYERS) * HIDDEN_SIZE,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 8, 8, 8),
        rope_theta=2000,
        guidance_embeds=False,
    )


def build_text_encoder(num_layers: int) -> Qwen3ForCausalLM:
    """Build an untrained text encoder of so many layers.

    The checkpoint has 28, as the pipeline reads hidden state 27. Training uses a net of 9, because
    identity layers between them are enough to fill up the rest.
    """
    config = Qwen3Config(
        num_hidden_layers=num_layers,
        max_window_layers=num_layers,
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        # With the default of 0.02, hidden states of this width begin too close to zero.
        initializer_range=0.08,
    )
    return Qwen3ForCausalLM(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build klein's scheduler, with exponential dynamic shifting."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Train the tokenizer: byte-level BPE with Qwen2's splitting, on prompts of the world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        # Five less, for the special tokens that are added below.
        vocab_size=VOCABULARY_SIZE - 5,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n", "assistant\n"] * 500 + draw_corpus(), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    fast = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],  # type: ignore[misc]
        # A token of the model, though bandit takes it for a password.
        unk_token="<|endoftext|>",  # nosec B106
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    fast.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    fast.add_tokens(["<think>", "</think>"], special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) <= VOCABULARY_SIZE, len(fast)
    return fast


def tokenize(
    tokenizer: Qwen2Tokenizer, prompts: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize prompts in the chat template, as the pipeline does, padded or cut to `length`.

    Return token ids and attention mask, each int64 [len(prompts), length].
    """
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for prompt in prompts
    ]
    tokens = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


def save_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKLFlux2,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    transformer: Flux2Transformer2DModel,
) -> None:
    """Write a checkpoint folder of Flux2KleinPipeline, all parts cast to bf16."""
    pipeline = Flux2KleinPipeline(
        build_scheduler(), vae, text_encoder, tokenizer, transformer, is_distilled=True
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
