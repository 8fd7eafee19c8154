"""Each rank reads its own slices only, and a checkpoint that does not fit is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

from flux_ray.parallel import load as loading
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Axis

CLASS = Flux2Transformer2DModel


def load(folder: Path, axis: Axis, **options: Any) -> tuple[torch.nn.Module, Checkpoint]:
    config = CLASS.load_config(folder)
    checkpoint = Checkpoint(folder)
    recipe = LoadSpec(checkpoint, axis, options.pop("dtype", torch.float32), **options)
    return load_sharded(lambda: CLASS.from_config(config), CLASS._tp_plan, recipe), checkpoint


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_reads_the_bytes_it_holds(
    transformer_folder: Callable[[str], Path], num_ranks: int
) -> None:
    for rank in range(num_ranks):
        model, checkpoint = load(transformer_folder("flux2"), Axis(rank, num_ranks))
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert checkpoint.num_bytes_read == held
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_the_dtype_is_the_one_asked_for(transformer_folder: Callable[[str], Path]) -> None:
    model, _ = load(transformer_folder("flux2"), Axis(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_an_uneven_split_is_refused_before_anything_is_read(
    transformer_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "read_local", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="to_q"):
        load(transformer_folder("flux2"), Axis(0, 3))


def copy_of(folder: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The same checkpoint in one file, edited."""
    model = CLASS.from_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    edit(tensors)
    save_file(tensors, to / "diffusion_pytorch_model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("x_embedder.weight"), "has no tensor x_embedder.weight"),
        (
            lambda tensors: tensors.update(more=torch.zeros(1)),
            "1 tensors that the model does not know, the first is more",
        ),
        (
            lambda tensors: tensors.update({"x_embedder.weight": torch.zeros(3, 3)}),
            r"x_embedder.weight in .* has the shape \[3, 3\]",
        ),
    ],
    ids=["missing", "unknown", "other shape"],
)
def test_another_models_checkpoint_is_refused(
    transformer_folder: Callable[[str], Path],
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    folder = copy_of(transformer_folder("flux2"), tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load(folder, Axis())


def test_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(ValueError, match="it has 2"):
        _ = Checkpoint(tmp_path).files


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere"):
        _ = Checkpoint(tmp_path).files


def test_deltas_are_added_before_the_dtype_is_set(
    transformer_folder: Callable[[str], Path],
) -> None:
    class One:
        def check(self, shapes: Mapping[str, torch.Size]) -> None:
            assert shapes["proj_out.weight"] == (16, 128)

        def __call__(self, name: str, shard: object, axis: Axis) -> torch.Tensor | None:
            return torch.ones(()) if name == "proj_out.weight" else None

    plain, _ = load(transformer_folder("flux2"), Axis())
    changed, _ = load(transformer_folder("flux2"), Axis(), deltas=(One(),), dtype=torch.bfloat16)
    assert torch.equal(changed.proj_out.weight, (plain.proj_out.weight + 1).bfloat16())
    assert torch.equal(changed.x_embedder.weight, plain.x_embedder.weight.bfloat16())
