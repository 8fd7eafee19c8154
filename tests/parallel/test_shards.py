"""What a rank holds of each parameter, decided from shapes alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3Model

from flux_ray.config.tier import check_heads
from flux_ray.parallel.checkpoint import Shard, shards_for
from flux_ray.parallel.load import build_empty
from flux_ray.parallel.mesh import Axis


def axis(rank: int, size: int) -> Axis:
    return Axis(rank, size)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("blocks", [(12,), (4, 8), (4, 4, 4)])
def test_the_parts_of_all_ranks_are_the_whole_block_by_block(
    dim: int, blocks: tuple[int, ...]
) -> None:
    whole = torch.arange(12 * 12).reshape(12, 12)
    shard = Shard(dim, blocks)
    parts = [shard.take(whole, axis(rank, 2)) for rank in range(2)]
    assert all(part.shape == shard.local_shape(whole.shape, axis(0, 2)) for part in parts)
    halves = [part.split([block // 2 for block in blocks], dim) for part in parts]
    rebuilt = [torch.cat(pair, dim) for pair in zip(*halves, strict=True)]
    assert torch.equal(torch.cat(rebuilt, dim), whole)


def test_fused_projections_are_split_inside_each_block() -> None:
    """Rows 0..5 are q, 6..11 are k: rank 1 of 2 takes the second half of each."""
    whole = torch.arange(12)[:, None].expand(12, 2)
    assert Shard(0, (6, 6)).take(whole, axis(1, 2))[:, 0].tolist() == [3, 4, 5, 9, 10, 11]


DEV = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
}


@pytest.fixture(scope="module")
def dev() -> Flux2Transformer2DModel:
    return build_empty(lambda: Flux2Transformer2DModel(**DEV))


@pytest.mark.parametrize(
    ("num_ranks", "num_parameters"),
    [
        (1, 32_223_281_152),
        (2, 16_519_806_976),
        (4, 8_668_069_888),
        (8, 4_742_201_344),
        (16, 2_779_267_072),
    ],
)
def test_a_rank_of_dev_holds_as_much_as_was_measured(
    dev: Flux2Transformer2DModel, num_ranks: int, num_parameters: int
) -> None:
    shards = shards_for(dev, dev._tp_plan, num_ranks)
    place = axis(0, num_ranks)
    shapes = (
        shards[name].local_shape(parameter.shape, place) if name in shards else parameter.shape
        for name, parameter in dev.named_parameters()
    )
    assert sum(shape.numel() for shape in shapes) == num_parameters


def test_dev_sums_eighty_times_a_forward(dev: Flux2Transformer2DModel) -> None:
    shards = shards_for(dev, dev._tp_plan, 2)
    assert sum(shard.dim == 1 for shard in shards.values()) == 80


def test_an_uneven_split_names_the_parameter(dev: Flux2Transformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q\.weight.* 5 "):
        shards_for(dev, dev._tp_plan, 5)


@pytest.mark.parametrize(
    ("tensor", "sequence", "name"), [(32, 1, "parallel.tensor"), (4, 5, "parallel.sequence")]
)
def test_a_split_that_cuts_a_head_names_the_setting(tensor: int, sequence: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_heads(48, tensor, sequence)


def test_dev_runs_on_two_times_four_ranks() -> None:
    check_heads(48, 2, 4)


def test_the_plans_of_transformers_are_read_too() -> None:
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=16,
    )
    model = build_empty(lambda: Qwen3Model(config))
    shards = shards_for(model, config.base_model_tp_plan, 2)
    assert shards["layers.1.self_attn.k_proj.weight"] == Shard(0, (16,))
    assert shards["layers.0.mlp.down_proj.weight"] == Shard(1, (64,))
    assert "layers.0.self_attn.q_norm.weight" not in shards


def test_one_rank_splits_nothing(
    dev: Flux2Transformer2DModel, transformer_folder: Callable[[str], Path]
) -> None:
    assert shards_for(dev, dev._tp_plan, 1) == {}
