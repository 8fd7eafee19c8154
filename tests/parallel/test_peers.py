"""Ours, DTensor and DeepSpeed say the same of one checkpoint, each with the least traffic."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux_ray.config.tier import Parallel
from flux_ray.parallel.mesh import Mesh
from tests.engine.small_flux1 import build_t5
from tests.gauges import Collectives
from tests.parallel.peers import T5_WAYS, WAYS
from tests.ranks import Ranks

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed; it comes with .[test]"
)


def forward(mesh: Mesh, way: str, folder: Path, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    model = WAYS[way](folder, mesh)
    with torch.no_grad(), Collectives() as collectives:
        sample = model(**inputs).sample
    return sample.numpy(), collectives.calls


@pytest.mark.parametrize(
    "way", ["ours", "dtensor", pytest.param("deepspeed", marks=needs_deepspeed)]
)
def test_each_way_equals_one_process_with_one_sum_for_every_row_parallel_output(
    run_ranks: Ranks,
    transformer_folder: Callable[[str], Path],
    transformer_inputs: Callable[..., dict[str, Any]],
    way: str,
) -> None:
    folder, inputs = transformer_folder("flux2"), transformer_inputs("flux2")
    model = Flux2Transformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        whole = model(**inputs).sample.numpy()
    answers = run_ranks(Parallel(tensor=2), forward, way, folder, inputs)
    sums = {"allreduce_", "all_reduce"}  # torch.distributed's, and the one that DTensors call
    for sample, collectives in answers:
        assert abs(sample - whole).max() <= 1e-5 * abs(whole).max()
        # Of 23 image and 7 text tokens, 128 wide: two double blocks sum attention and MLP of
        # either stream, two single blocks everything at once.
        image, text, joint = (num_tokens * 128 * 4 for num_tokens in (23, 7, 30))
        expected = sorted(2 * [image, image, text, text, joint])
        assert sorted(num_bytes for _, num_bytes in collectives) == expected
        assert {operator for operator, _ in collectives} <= sums


T5_INPUTS = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))


def encode(mesh: Mesh, way: str, folder: Path) -> tuple[Any, list[Any], int]:
    model = T5_WAYS[way](folder, mesh)
    with torch.no_grad(), Collectives() as collectives:
        states = model(T5_INPUTS).last_hidden_state
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return states.numpy(), collectives.calls, num_bytes


@pytest.mark.parametrize("way", ["ours", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_each_way_to_split_t5_equals_one_process(
    run_ranks: Ranks, tmp_path: Path, way: str
) -> None:
    """Also in its position bias, of which each rank needs the heads that it has."""
    torch.manual_seed(0)
    whole = build_t5(64).eval()
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = whole(T5_INPUTS).last_hidden_state.numpy()
    # Embedding and norms are whole on every rank.
    expected_bytes = sum(
        each.nbytes if "shared" in name or "norm" in name else each.nbytes // 2
        for name, each in whole.named_parameters()
    )
    for states, collectives, num_bytes in run_ranks(Parallel(tensor=2), encode, way, tmp_path):
        assert abs(states - expected).max() <= 1e-5 * abs(expected).max()
        # Two blocks sum attention and MLP, each of 40 tokens, 64 wide.
        assert collectives == 4 * [("allreduce_", 40 * 64 * 4)]
        assert num_bytes == expected_bytes
