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
from tests.gauges import Collectives
from tests.parallel.peers import WAYS
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
