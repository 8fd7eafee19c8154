"""FLUX.2 klein: how a prompt is given to Qwen3, as in Flux2KleinPipeline, and which klein it is.

The step-distilled klein, its base model and klein KV have the same parts. Each generates poor
images, without any error, if it is stepped as another one, so that the index must name it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from flux_ray.engine.api import TextModel
from flux_ray.engine.flux2.checkpoint import CheckpointKind
from flux_ray.engine.loading import check_class, first_layers


def qwen3(folder: Path, num_layers: int) -> TextModel:
    """Return klein's text model, cut to its first layers, from the config in `folder`."""
    return first_layers(Qwen3Model, Qwen3Config.from_pretrained(folder), num_layers)


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's Qwen2 tokenizer with its chat template."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of the prompt in its chat template, not cut."""
    # The same template arguments as in the pipeline's `encode_prompt`: with others the count would
    # be of another text, and the warning about a cut prompt wrong.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(tokenizer(text)["input_ids"])


def check_distilled(index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint is a step-distilled klein."""
    check_class(index, Flux2KleinPipeline, weights)
    if not index.get("is_distilled"):
        raise ValueError(
            f"weights {weights!r} are not step-distilled (is_distilled in model_index.json): they"
            " need classifier-free guidance; serve them as a tier of klein base"
        )


def check_base(index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint is a klein base model, not step-distilled."""
    check_class(index, Flux2KleinPipeline, weights)
    if index.get("is_distilled"):
        raise ValueError(
            f"weights {weights!r} are step-distilled (is_distilled in model_index.json):"
            " classifier-free guidance would spoil their images; serve them as a tier of klein,"
            " not of klein base"
        )


def check_kv(index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint is a klein KV, whose index has no `is_distilled`."""
    check_class(index, Flux2KleinKVPipeline, weights)


KLEIN = CheckpointKind(
    pipeline=Flux2KleinPipeline,
    layers=(9, 18, 27),
    text_model=qwen3,
    load_tokenizer=load_tokenizer,
    num_tokens=num_tokens,
    check_index=check_distilled,
)
KLEIN_BASE = replace(KLEIN, check_index=check_base)
# Its own pipeline is not used: that one changes the transformer as soon as it is made, so that it
# cannot be made without one. What is used of klein's is the same.
KLEIN_KV = replace(KLEIN, check_index=check_kv, keeps_keys=True)
