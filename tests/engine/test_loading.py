"""Weights are named in three ways; what does not fit is refused before a byte of them is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Quantization
from flux_ray.engine.api import Placement
from flux_ray.engine.loading import fetch, load_config
from flux_ray.engine.registry import load_adapter
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import held_parts
from flux_ray.tiny import KLEIN_CHECKPOINT
from flux_ray.weights import download
from flux_ray.weights.source import CONFIGS, WeightSource, source_for

TINY = tier_for("tiny")
HUB = "owner/name@0123abc"
# As the hub lists a repository.
FILES = [
    "model_index.json",
    "flux2-dev.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/pytorch_model.bin",
    "tokenizer/chat_template.jinja",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_the_three_ways(tmp_path: Path) -> None:
    assert source_for("embedded") == WeightSource(str(KLEIN_CHECKPOINT))
    assert source_for(str(tmp_path)) == WeightSource(str(tmp_path))
    assert source_for("owner/name.v2@0123abc") == WeightSource("owner/name.v2", "0123abc")


@pytest.mark.parametrize("weights", ["owner/name", "/no/such/folder", "name@main", "", "a/b/c@d"])
def test_anything_else_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="owner/name@revision"):
        source_for(weights)


def test_a_folder_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "snapshot_download", lambda *_, **__: pytest.fail("network"))
    assert fetch(source_for("embedded"), CONFIGS) == KLEIN_CHECKPOINT
    assert load_config(KLEIN_CHECKPOINT, "model_index.json")["is_distilled"] is True


class Hub:
    """Stands for the hub: has every file of the embedded checkpoint."""

    def __init__(self) -> None:
        self.revisions: set[str] = set()
        self.taken: list[str] = []

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str,
        allow_patterns: Any,
        dry_run: bool = False,
        **_: object,
    ) -> str | list[object]:
        assert repository == "owner/name"
        if dry_run:
            return []
        self.revisions.add(revision)
        self.taken += filter_repo_objects(FILES, allow_patterns=allow_patterns)
        return str(KLEIN_CHECKPOINT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "check_reachable", lambda *_: None)
    monkeypatch.setattr(download, "snapshot_download", hub.snapshot_download)
    return hub


def test_of_the_hub_only_what_is_needed_is_taken_at_the_pinned_revision(hub: Hub) -> None:
    load_adapter(TINY, HUB, Placement("float32", "cpu"))
    assert hub.revisions == {"0123abc"}
    unneeded = {name for name in FILES if name.endswith(".bin")} | {"flux2-dev.safetensors"}
    assert sorted(hub.taken) == sorted(set(FILES) - unneeded)


def test_where_the_text_encoder_is_shared_it_is_not_taken(hub: Hub) -> None:
    adapter = load_adapter(TINY, HUB, Placement("float32", "cpu", text_encoder="shared"))
    assert not any(name.endswith(("00002.safetensors", "merges.txt")) for name in hub.taken)
    with pytest.raises(AssertionError, match="shared"):
        adapter.encode_prompt("a red circle")


def mesh_of(tensor: int, sequence: int) -> Mesh:
    """The place of a rank whose others do not exist."""
    return Mesh(Axis(0, tensor * sequence), Axis(0, tensor), Axis(0, sequence))


@pytest.mark.parametrize(
    ("tensor", "sequence", "message"),
    [
        (3, 1, "parallel.tensor 3 does not divide the 4 heads"),
        (1, 3, "parallel.sequence 3 does not divide the 4 heads"),
        (2, 4, "parallel.sequence 4 does not divide the 2 heads"),
        (4, 1, "parallel.tensor 4 does not divide the text encoder's 2 heads"),
    ],
)
def test_an_impossible_degree_is_refused_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, tensor: int, sequence: int, message: str
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    placement = Placement("float32", "cpu", mesh_of(tensor, sequence))
    with pytest.raises(ValueError, match=message):
        load_adapter(TINY, None, placement)


def test_every_part_has_the_dtype_that_was_asked_for() -> None:
    adapter = load_adapter(TINY, None, Placement("bfloat16", "cpu"))
    parts = (
        adapter.pipeline.transformer,
        adapter.pipeline.vae,
        adapter.prompts.pipeline.text_encoder,
    )
    for part in parts:
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
        assert not part.training


def test_a_precision_that_cannot_be_split_is_refused_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    placement = Placement("float32", "cpu", mesh_of(2, 1), quantization="nf4")
    with pytest.raises(ValueError, match="nf4"):
        load_adapter(TINY, None, placement)


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_each_part_has_its_own_precision(quantization: Quantization) -> None:
    whole = sizes(load_adapter(TINY, None, Placement("bfloat16", "cpu")))
    placement = Placement("bfloat16", "cpu", quantization=quantization)
    transformer, text_encoder = sizes(load_adapter(TINY, None, placement))
    assert transformer < 0.7 * whole[0] and text_encoder == whole[1]
    placement = Placement("bfloat16", "cpu", encoder_quantization=quantization)
    adapter = load_adapter(TINY, None, placement)
    transformer, text_encoder = sizes(adapter)
    assert transformer == whole[0] and text_encoder < 0.7 * whole[1]
    assert adapter.encode_prompt("a red circle").tensors["embeds"].dtype == torch.bfloat16


def sizes(adapter: Any) -> tuple[int, int]:
    """Bytes of the transformer and of the text encoder."""
    parts = adapter.pipeline.transformer, adapter.prompts.pipeline.text_encoder
    return tuple(
        sum(part.nbytes for parameter in model.parameters() for part in held_parts(parameter))
        for model in parts
    )


def test_a_tier_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="tier flux-2-dev needs weights"):
        load_adapter(tier_for("flux-2-dev"), None, Placement("float32", "cpu"))
