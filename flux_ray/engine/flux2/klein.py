"""FLUX.2 klein, step-distilled: how a prompt is given to Qwen3, as in Flux2KleinPipeline."""

from pathlib import Path
from typing import Any

from diffusers import Flux2KleinPipeline
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


def check_index(index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint is a step-distilled klein."""
    check_class(index, Flux2KleinPipeline, weights)
    if not index.get("is_distilled"):
        raise ValueError(
            f"weights {weights!r} are not step-distilled: they need classifier-free guidance,"
            " which the klein adapter does not do"
        )


KLEIN = CheckpointKind(
    pipeline=Flux2KleinPipeline,
    layers=(9, 18, 27),
    text_model=qwen3,
    load_tokenizer=load_tokenizer,
    num_tokens=num_tokens,
    check_index=check_index,
)
