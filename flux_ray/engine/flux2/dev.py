"""FLUX.2 dev, pro and max: how a prompt is given to Mistral.

As in diffusers' Flux2Pipeline, a prompt is a conversation that begins with a system message.
"""

from pathlib import Path
from typing import Any

from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
from transformers import AutoTokenizer, Mistral3Config, MistralModel

from flux_ray.engine.api import TextModel
from flux_ray.engine.flux2.checkpoint import CheckpointKind
from flux_ray.engine.loading import check_class, first_layers


def mistral3(folder: Path, num_layers: int) -> TextModel:
    """Return dev's text model, cut to its first layers and without its vision tower."""
    config = Mistral3Config.from_pretrained(folder).text_config
    return first_layers(MistralModel, config, num_layers)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that is inside the PixtralProcessor named by the checkpoint.

    The processor itself needs torchvision, for images that it never gets here. It also adds a BOS
    token if the chat template has none; as we do not, raise ValueError for such a template.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = tokenizer.apply_chat_template(messages_for(""), tokenize=False)[0]
    if not text.startswith(tokenizer.bos_token):
        raise ValueError(f"the chat template in {folder} does not begin with the BOS token")
    return tokenizer


def messages_for(prompt: str) -> list[list[dict[str, Any]]]:
    """Return a batch of one conversation: the system message and the prompt."""
    messages: list[list[dict[str, Any]]] = format_input([prompt], SYSTEM_MESSAGE)
    return messages


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of the whole conversation, formatted and not cut."""
    return len(tokenizer.apply_chat_template(messages_for(prompt))["input_ids"][0])


def check_index(index: dict[str, Any], weights: str) -> None:
    """Raise ValueError unless the checkpoint is one of FLUX.2 dev, with guidance embedded."""
    check_class(index, Flux2Pipeline, weights)


DEV = CheckpointKind(
    pipeline=Flux2Pipeline,
    layers=(10, 20, 30),
    text_model=mistral3,
    load_tokenizer=load_tokenizer,
    num_tokens=num_tokens,
    check_index=check_index,
)
