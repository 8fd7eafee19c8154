"""Prompts by `transformers serve`, which is a whole LLM server that other people have written.

Its LLM says one sentence to everybody, word by word, and stops.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from flux_ray.config import GatewayArgs, Upsampling
from flux_ray.gateway.api import build_api
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.listening import free_port

pytestmark = pytest.mark.slow
SAID = "a large red ring on white"
# More tokens than tiny's tokenizer has.
VOCABULARY_SIZE = 448
START_S = 120.0


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an LLM in which every token of SAID is followed by the next one."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = AutoTokenizer.from_pretrained(KLEIN_CHECKPOINT / "tokenizer")
    # An answer begins behind a line's end, and ends with the end of a message.
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    words = tokenizer(SAID, add_special_tokens=False)["input_ids"]
    chain = [line_end, *words, tokenizer.eos_token_id]
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=VOCABULARY_SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY_SIZE))
        model.lm_head.weight[chain[1:], chain[:-1]] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(llm: Path) -> Iterator[str]:
    """The address of the LLM's server, which is up."""
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", str(llm)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_until_up(process: "subprocess.Popen[bytes]", url: str) -> None:
    until_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            if httpx.get(url, timeout=START_S, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("transformers serve did not start")


@pytest.fixture
async def ask_with(
    router, gateway_args: GatewayArgs, url: str, llm: Path, ask_of
) -> Callable[..., Any]:
    """Return `ask_with(extra_body={})`: ask with these settings of the upsampler."""

    async def ask_with(**settings: Any) -> dict[str, Any]:
        upsampling = Upsampling(url=url, model=str(llm), timeout_s=60, **settings)
        args = gateway_args.model_copy(update={"upsampling": upsampling})
        answer = await ask_of(build_api(router, args), prompt_upsampling=True)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    return ask_with


async def test_its_words_are_used_and_come_back(ask_with, handles) -> None:
    told = await ask_with()
    assert (told["warnings"], told["data"][0]["revised_prompt"]) == ([], SAID)
    assert handles.requests[0].prompt == SAID


@pytest.mark.parametrize(
    "body", [{"max_tokens": 2}, {"messages": "a ring"}], ids=["cut", "refused"]
)
async def test_an_answer_that_is_cut_and_a_refusal_leave_the_words(
    ask_with, handles, body: dict[str, Any]
) -> None:
    told = await ask_with(extra_body=body)
    assert "the prompt was used as sent" in told["warnings"][0]
    assert "revised_prompt" not in told["data"][0]
    assert handles.requests[0].prompt == "a ring"
