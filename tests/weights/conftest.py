"""A fake hub with a small checkpoint, which huggingface_hub of this process uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub, serve_hub, use_hub

LARGE = "transformer/diffusion_pytorch_model.safetensors"
FILES = {
    "model_index.json": b"{}",
    "LICENSE.md": b"be good",
    "flux2.safetensors": b"the same once more",
    "transformer/config.json": b'{"a": 1}',
    LARGE: os.urandom(3_000_000),
    "text_encoder/pytorch_model.bin": b"code",
    "text_encoder/model.safetensors": os.urandom(100_000),
    "tokenizer/merges.txt": b"a b",
    # FLUX.1 has a second text encoder, in two files.
    "text_encoder_2/model.safetensors.index.json": b'{"weight_map": {}}',
    "text_encoder_2/model-00001-of-00002.safetensors": os.urandom(50_000),
    "text_encoder_2/model-00002-of-00002.safetensors": os.urandom(50_000),
    "text_encoder_2/flax_model.msgpack": b"unused",
    "tokenizer_2/spiece.model": b"words",
}
UNUSED = {
    "LICENSE.md",
    "flux2.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/flax_model.msgpack",
}
USED = sorted(FILES.keys() - UNUSED)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(FILES) as hub:
        use_hub(monkeypatch, hub.address, cache)
        yield hub
