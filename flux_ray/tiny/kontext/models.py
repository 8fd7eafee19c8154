"""Build the parts of the tiny Kontext: FLUX.1's classes with small dimensions, and tokenizers."""

import collections
import json
import math
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flux_ray.tiny import world
from flux_ray.tiny.tasks import draw_corpus

WIDTH = 128
LATENT_CHANNELS = 16
# Those of FLUX.1's VAE. The weights are scaled until they fit the latents.
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
CLIP_LENGTH = 77
CLIP_VOCABULARY_SIZE = 768
T5_VOCABULARY_SIZE = 256
# Of `exp(shift)` is 7, which makes the sampler's sigmas those of klein for an image of 64 tokens.
SHIFT = math.log(7)


def build_vae() -> AutoencoderKL:
    """Build the untrained VAE: it encodes 8 x 8 pixels into 16 channels, so a token has 64."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=world.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
    )


def build_transformer() -> FluxTransformer2DModel:
    """Build the untrained transformer, 128 wide, with an embedding of the guidance."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_clip() -> CLIPTextModel:
    """Build the untrained text encoder whose pooled output stands for the whole prompt."""
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=CLIP_VOCABULARY_SIZE - 2,
        eos_token_id=CLIP_VOCABULARY_SIZE - 1,
        pad_token_id=CLIP_VOCABULARY_SIZE - 1,
    )
    return CLIPTextModel(config)


def build_t5() -> T5EncoderModel:
    """Build the untrained text encoder whose hidden states the image attends to."""
    config = T5Config(
        vocab_size=T5_VOCABULARY_SIZE,
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=4,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,  # type: ignore[call-arg]
    )
    return T5EncoderModel(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build FLUX.1's scheduler, with one shift for all sizes: all of them are small."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=SHIFT,
        max_shift=SHIFT,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_clip_tokenizer() -> CLIPTokenizer:
    """Train the byte-level BPE of CLIP on prompts of the world.

    Every byte is in the vocabulary twice, inside of a word and at its end, so that any text can be
    written. The end of a text is the largest token, where CLIP pools.
    """
    blank = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY_SIZE - len(letters) - 2,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(draw_corpus(), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [first + second for first, second in merges]
    words += [f"<|unused{index}|>" for index in range(CLIP_VOCABULARY_SIZE - 2 - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    assert len(vocabulary) == CLIP_VOCABULARY_SIZE, len(vocabulary)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=CLIP_LENGTH,
    )


def build_t5_tokenizer() -> T5Tokenizer:
    """Make T5's unigram vocabulary: the words of the world's prompts, and single characters.

    A word's score is the logarithm of its share; characters are far below, for words unknown.
    """
    counts = collections.Counter(
        word for prompt in draw_corpus() for word in prompt.replace(",", "").split()
    )
    total = counts.total()
    words = [(f"▁{word}", math.log(count / total)) for word, count in counts.most_common()]
    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -15.0), *words]
    vocabulary += [(character, -15.0) for character in characters]
    assert len(vocabulary) <= T5_VOCABULARY_SIZE, len(vocabulary)
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def save_pipeline(folder: Path, **parts: Any) -> None:
    """Write a checkpoint folder of FluxKontextPipeline, all parts cast to bf16."""
    pipeline = FluxKontextPipeline(scheduler=build_scheduler(), **parts)
    pipeline.to(torch.bfloat16).save_pretrained(folder)
