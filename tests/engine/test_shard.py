"""A rank loads from its own file what it would cut out of the whole checkpoint, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from flux_ray.catalog import tier_for
from flux_ray.config import Parallel, TierArgs
from flux_ray.engine.api import Placement
from flux_ray.engine.registry import load_adapter
from flux_ray.engine.shard import write_shards
from flux_ray.parallel.checkpoint import Checkpoint, RankCheckpoint
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.tiny import KLEIN_CHECKPOINT
from flux_ray.weights.shards import MANIFEST, read_manifest
from flux_ray.weights.source import WeightsUnavailable
from flux_ray.weights.start import parts_of_ranks, prepare_weights
from tests.engine.flux1.conftest import tier_of
from tests.engine.small_flux1 import save_small_flux1

TINY = tier_for("tiny-tp2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("shards") / "tiny"
    write_shards(TINY, None, Parallel(tensor=2), "colocated", to, lambda _: None)
    return to


def placed(rank: int, **options: Any) -> Placement:
    return Placement("float32", "cpu", Mesh(Axis(rank, 2), Axis(rank, 2), Axis()), **options)


def tensors_of(weights: str | None, placement: Placement) -> dict[str, torch.Tensor]:
    adapter = load_adapter(TINY, weights, placement)
    parts = {"transformer": adapter.pipeline.transformer, "vae": adapter.pipeline.vae}
    if adapter.prompts is not None:
        parts["text_encoder"] = adapter.prompts.pipeline.text_encoder
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in saved_tensors(module)
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_loaded_is_equal(shards: Path, rank: int) -> None:
    whole, split = tensors_of(None, placed(rank)), tensors_of(str(shards), placed(rank))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    assert all(whole[name].dtype == split[name].dtype for name in whole)


def test_a_rank_reads_no_byte_that_another_one_holds(shards: Path) -> None:
    for part in ("transformer", "text_encoder"):
        sizes = [path.stat().st_size for path in (shards / part).glob("rank-*-of-2.safetensors")]
        [whole] = (KLEIN_CHECKPOINT / part).glob("*.safetensors")
        assert len(sizes) == 2 and max(sizes) < 0.75 * whole.stat().st_size


def test_the_whole_checkpoint_is_not_in_it(shards: Path) -> None:
    names = {path.relative_to(shards).as_posix() for path in shards.rglob("*") if path.is_file()}
    manifest = read_manifest(shards)
    assert manifest is not None and names == set(manifest.files) | {MANIFEST}
    assert {name for name in names if name.endswith(".safetensors")} == {
        *(f"{part}/rank-{rank}-of-2.safetensors" for part in manifest.num_ranks for rank in (0, 1)),
        "vae/diffusion_pytorch_model.safetensors",
    }
    with safe_open(shards / "transformer/rank-0-of-2.safetensors", "pt") as file:
        assert set(file.keys()) == set(Checkpoint(KLEIN_CHECKPOINT / "transformer").files)


def test_another_layout_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankCheckpoint, "read", lambda *_: pytest.fail("read"))
    args = TierArgs(tier="tiny", weights=str(shards), device="cpu")
    with pytest.raises(WeightsUnavailable, match=r"^tier tiny: .* parallel\.tensor 2, .* has 1"):
        prepare_weights(args, parts_of_ranks(args))
    with pytest.raises(ValueError, match="split for 2 ranks, and 1 would read it"):
        load_adapter(TINY, str(shards), Placement("float32", "cpu"))


def test_a_tier_of_that_layout_is_not_refused(shards: Path) -> None:
    args = TierArgs(tier="tiny-tp2", weights=str(shards), device="cpu", parallel=Parallel(tensor=2))
    prepare_weights(args, parts_of_ranks(args))


def test_a_shared_text_encoder_is_not_split(tmp_path: Path) -> None:
    to = tmp_path / "tiny"
    manifest = write_shards(TINY, None, Parallel(tensor=2), "shared", to, lambda _: None)
    assert manifest.num_ranks == {"transformer": 2, "text_encoder": 1}
    placement = placed(1, text_encoder="shared")
    whole, split = tensors_of(None, placement), tensors_of(str(to), placement)
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_what_cannot_be_split_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor 3 does not divide the 4 heads"):
        write_shards(TINY, None, Parallel(tensor=3), "colocated", tmp_path / "3", print)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="there is already"):
        write_shards(TINY, None, Parallel(tensor=2), "colocated", tmp_path, print)


def test_split_weights_are_not_split_again(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="is split already"):
        write_shards(TINY, str(shards), Parallel(), "colocated", tmp_path / "2", print)


def test_a_manifest_of_a_later_version_says_so(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(WeightsUnavailable, match="not as this version of flux-ray writes it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_flux1_has_rank_files_of_t5_and_clip_whole(tmp_path: Path, rank: int) -> None:
    whole_folder = tmp_path / "dev"
    save_small_flux1(whole_folder, "dev")
    tier, to = tier_of("dev"), tmp_path / "split"
    manifest = write_shards(
        tier, str(whole_folder), Parallel(tensor=2), "colocated", to, lambda _: None
    )
    assert manifest.num_ranks == {"transformer": 2, "text_encoder_2": 2}
    assert len(list((to / "text_encoder").glob("*.safetensors"))) == 1

    def tensors(weights: Path) -> dict[str, torch.Tensor]:
        adapter = load_adapter(tier, str(weights), placed(rank))
        parts = (adapter.pipeline.transformer, adapter.prompts.t5, adapter.prompts.clip)
        return {
            f"{number}.{name}": tensor
            for number, module in enumerate(parts)
            for name, tensor in saved_tensors(module)
        }

    whole, split = tensors(whole_folder), tensors(to)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
