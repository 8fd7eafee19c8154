"""A split transformer says what the whole one says, whatever the split and the token counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import Tensor

from flux_ray.config.tier import Parallel
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Mesh
from flux_ray.parallel.sequence import split_sequence
from tests.ranks import Ranks

CLASSES = {"flux2": Flux2Transformer2DModel, "flux1": FluxTransformer2DModel}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]
# (image tokens with references, text tokens): even, odd, fewer than ranks.
TOKENS = [(24, 8), (23, 7), (41, 5), (3, 1)]


def load(mesh: Mesh, family: str, folder: Path) -> torch.nn.Module:
    model_class = CLASSES[family]
    config = model_class.load_config(folder)
    model = load_sharded(
        lambda: model_class.from_config(config),
        model_class._tp_plan,
        LoadSpec(Checkpoint(folder), mesh.tensor, torch.float32),
    )
    split_sequence(model, mesh.sequence)
    return model


def forward_all(mesh: Mesh, family: str, folder: Path, inputs: list[dict[str, Any]]) -> list[Any]:
    """Twice: what one forward leaves behind must not change the next one."""
    model = load(mesh, family, folder)
    with torch.inference_mode():
        first = [model(**case).sample for case in inputs]
        again = [model(**case, return_dict=False)[0] for case in inputs]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return [output.clone().numpy() for output in first]


@pytest.fixture(scope="module", params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(
    family: str,
    transformer_folder: Callable[[str], Path],
    transformer_inputs: Callable[..., dict[str, Any]],
) -> list[Tensor]:
    """diffusers' own loading and forward, in one process."""
    model = CLASSES[family].from_pretrained(transformer_folder(family)).eval()
    with torch.inference_mode():
        return [model(**transformer_inputs(family, *tokens)).sample for tokens in TOKENS]


@pytest.mark.parametrize(("tensor", "sequence"), LAYOUTS)
def test_every_layout_equals_one_process(
    run_ranks: Ranks,
    family: str,
    expected: list[Tensor],
    transformer_folder: Callable[[str], Path],
    transformer_inputs: Callable[..., dict[str, Any]],
    tensor: int,
    sequence: int,
) -> None:
    inputs = [transformer_inputs(family, *tokens) for tokens in TOKENS]
    answers = run_ranks(
        Parallel(tensor=tensor, sequence=sequence),
        forward_all,
        family,
        transformer_folder(family),
        inputs,
    )
    for outputs in answers:
        for output, whole in zip(outputs, expected, strict=True):
            error = (torch.from_numpy(output) - whole).abs().max()
            assert error <= 1e-5 * whole.abs().max()
            if tensor == sequence == 1:
                assert error == 0
    for outputs in answers[1:]:
        assert all((a == b).all() for a, b in zip(outputs, answers[0], strict=True))


def test_a_mask_is_refused_where_tokens_are_split(
    run_ranks: Ranks,
    transformer_folder: Callable[[str], Path],
    transformer_inputs: Callable[..., dict[str, Any]],
) -> None:
    inputs = transformer_inputs("flux2")
    mask = {"attention_mask": torch.ones(1, 1, 1, 30, dtype=torch.bool)}

    def refuse(mesh: Mesh, folder: Path, inputs: dict[str, Any]) -> str:
        try:
            load(mesh, "flux2", folder)(**inputs, joint_attention_kwargs=mask)
        except ValueError as error:
            return str(error)
        return "taken"

    answers = run_ranks(Parallel(sequence=2), refuse, transformer_folder("flux2"), inputs)
    assert answers == ["sequence parallel attention takes no mask"] * 2
