"""FLUX.2 klein, distilled: prompts as Flux2KleinPipeline puts them to Qwen3."""

from pathlib import Path
from typing import Any

from diffusers import Flux2KleinPipeline
from transformers import AutoTokenizer

from flux_ray.engine.flux2.family import Family, check_class
from flux_ray.engine.loading import qwen3


def load_tokenizer(folder: Path) -> Any:
    """Qwen2's, with its chat template."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """Of the prompt in its chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(tokenizer(text)["input_ids"])


def check_index(index: dict[str, Any], weights: str) -> None:
    """Only distilled klein."""
    check_class(index, Flux2KleinPipeline, weights)
    if not index.get("is_distilled"):
        raise ValueError(
            f"weights {weights!r} are not step-distilled: they need classifier-free guidance,"
            " which the klein adapter does not do"
        )


KLEIN = Family(
    pipeline=Flux2KleinPipeline,
    layers=(9, 18, 27),
    text_model=qwen3,
    load_tokenizer=load_tokenizer,
    num_tokens=num_tokens,
    check_index=check_index,
)
