"""What is held in fewer bits is what was asked for, the same bits on any number of ranks."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import Flux2Transformer2DModel, Flux3Transformer2DModel, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import (
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from flux_ray.config.tier import Parallel
from flux_ray.parallel import load as loading
from flux_ray.parallel import precision
from flux_ray.parallel.checkpoint import Checkpoint, shards_for
from flux_ray.parallel.load import LoadSpec, build_empty, load_sharded, plan_storage, saved_tensors
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import (
    PrecisionNotApplied,
    StorageFormat,
    held_parts,
    is_quantized,
    quantize,
    quantizes_activations,
    stored_bytes,
)
from tests.ranks import Ranks

CLASSES = {"flux2": Flux2Transformer2DModel, "flux1": FluxTransformer2DModel}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def load(
    axis: Axis, family: str, folder: Path, quantization: Any, dtype: torch.dtype = torch.float32
) -> nn.Module:
    model_class = CLASSES[family]
    config = model_class.load_config(folder)
    recipe = LoadSpec(Checkpoint(folder), axis, dtype, quantization=quantization)
    return load_sharded(lambda: model_class.from_config(config), model_class._tp_plan, recipe)


def held(mesh: Mesh, *what: Any) -> dict[str, list[Any]]:
    """What a rank holds of each parameter, its data's bytes and its scales."""
    model = load(mesh.tensor, *what)
    return {
        name: [part.view(torch.uint8).numpy() for part in held_parts(parameter)]
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, transformer_folder: Callable[[str], Path]) -> Path:
    return transformer_folder(family)


def block_linears(model: nn.Module) -> set[str]:
    """The weights of all linears that stand in a list of blocks."""
    return {
        f"{blocks}.{name}.weight"
        for blocks, module in model.named_modules()
        if type(module) is nn.ModuleList
        for name, part in module.named_modules()
        if type(part) is nn.Linear
    }


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (lambda: Flux2Transformer2DModel(num_layers=1, num_single_layers=1), set()),
        (
            lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1),
            {
                "transformer_blocks.0.norm1.linear.weight",
                "transformer_blocks.0.norm1_context.linear.weight",
                "single_transformer_blocks.0.norm.linear.weight",
            },
        ),
        (lambda: Flux3Transformer2DModel(num_layers=1, num_single_layers=1), set()),
        (lambda: Qwen3Model(Qwen3Config(**TEXT, **HEADS)), set()),
        (lambda: MistralModel(MistralConfig(**TEXT, **HEADS)), set()),
        (lambda: T5EncoderModel(T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4)), set()),
    ],
    ids=["flux2", "flux1", "flux3", "qwen3", "mistral", "t5"],
)
def test_only_the_linear_weights_of_blocks_are_quantized(
    model: Callable[[], nn.Module], kept: set[str]
) -> None:
    """And of these not FLUX.1's modulation, which FLUX.2 has outside of its blocks."""
    empty = build_empty(model)
    chosen = {name for name, _ in empty.named_parameters() if is_quantized(name)}
    assert kept <= block_linears(empty)
    assert chosen == block_linears(empty) - kept
    assert len(chosen) >= 10


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_bytes_of_many_ranks_are_the_slices_of_one(
    run_ranks: Ranks, family: str, folder: Path, quantization: str, num_ranks: int
) -> None:
    whole = held(Mesh(), family, folder, quantization, torch.bfloat16)
    ranks = run_ranks(
        Parallel(tensor=num_ranks), held, family, folder, quantization, torch.bfloat16
    )
    model_class = CLASSES[family]
    empty = build_empty(lambda: model_class.from_config(model_class.load_config(folder)))
    shards = shards_for(empty, model_class._tp_plan, num_ranks)
    split = {name for name in shards if is_quantized(name)}
    assert {shards[name].dim for name in split} == {0, 1}
    for rank, parts in enumerate(ranks):
        for name in split:
            shard, axis = shards[name], Axis(rank, num_ranks)
            data, *scales = (torch.from_numpy(part) for part in whole[name])
            expected = [shard.take(data, axis)]
            expected += [shard.take(s, axis) if shard.dim == 0 else s for s in scales]
            for part, wanted in zip(parts[name], expected, strict=True):
                assert np.array_equal(part, wanted.numpy()), name


@pytest.mark.parametrize(
    ("quantization", "config"), [("fp8", Float8WeightOnlyConfig), ("int8", Int8WeightOnlyConfig)]
)
def test_one_rank_holds_what_torchao_makes_itself(
    family: str, folder: Path, quantization: str, config: type
) -> None:
    ours = load(Axis(), family, folder, quantization)
    theirs = CLASSES[family].from_pretrained(folder).eval()
    chosen = {name for name, _ in theirs.named_parameters() if is_quantized(name)}
    make = config(set_inductor_config=False)
    quantize_(theirs, make, filter_fn=lambda _, name: f"{name}.weight" in chosen)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert type(mine) is type(other)
        for part, wanted in zip(held_parts(mine), held_parts(other), strict=True):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8)), name


def forward(mesh: Mesh, inputs: dict[str, Any], *what: Any) -> Any:
    model = load(mesh.tensor, *what)
    dtype = what[-1]
    cast = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    with torch.inference_mode():
        output = model(**cast, return_dict=False)[0]
    assert output.dtype == dtype
    return output.float().numpy()


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("quantization", "bound"), [("fp8", 0.2), ("int8", 0.1)])
def test_a_forward_in_fewer_bits_is_near_and_the_same_on_two_ranks(
    run_ranks: Ranks,
    family: str,
    folder: Path,
    transformer_inputs: Callable[..., dict[str, Any]],
    quantization: str,
    bound: float,
) -> None:
    """The bounds are of random weights, for which quantization is at its worst."""
    inputs = transformer_inputs(family)
    plain = forward(Mesh(), inputs, family, folder, None, torch.float32)
    one = forward(Mesh(), inputs, family, folder, quantization, torch.float32)
    assert 0.001 < relative(one, plain) < bound
    for two in run_ranks(
        Parallel(tensor=2), forward, inputs, family, folder, quantization, torch.float32
    ):
        assert np.abs(two - one).max() <= 1e-5 * np.abs(one).max()
    half = forward(Mesh(), inputs, family, folder, quantization, torch.bfloat16)
    assert relative(half, plain) < bound


def test_activations_in_fp8_too_stay_near(
    folder: Path,
    family: str,
    transformer_inputs: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a card with FP8 units; torch has the product for the CPU too."""
    inputs = transformer_inputs(family)
    plain = forward(Mesh(), inputs, family, folder, None, torch.float32)
    weights_only = forward(Mesh(), inputs, family, folder, "fp8", torch.bfloat16)
    monkeypatch.setattr(precision, "cuda_capability", lambda _: (9, 0))
    both = forward(Mesh(), inputs, family, folder, "fp8", torch.bfloat16)
    assert not np.array_equal(both, weights_only)
    assert relative(both, plain) < 0.3


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "both"),
    [
        ((8, 9), torch.bfloat16, (64, 32), True),
        ((10, 0), torch.bfloat16, (64, 32), True),
        ((8, 6), torch.bfloat16, (64, 32), False),
        (None, torch.bfloat16, (64, 32), False),
        ((9, 0), torch.float32, (64, 32), False),
        ((9, 0), torch.bfloat16, (64, 24), False),
    ],
)
def test_activations_are_quantized_where_the_card_can(
    capability: tuple[int, int] | None, dtype: torch.dtype, shape: tuple[int, int], both: bool
) -> None:
    assert quantizes_activations(capability, dtype, shape) is both


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_a_row_of_zeros_stays_zero(quantization: Any) -> None:
    weight = torch.randn(4, 16)
    weight[1] = 0
    small = quantize(weight, quantization, torch.float32, Axis())
    assert (small.dequantize()[1] == 0).all()
    assert torch.allclose(small.dequantize(), weight, atol=0.1)


def bytes_held(mesh: Mesh, family: str, folder: Path, quantization: Any) -> tuple[int, int]:
    """Loaded, and planned from a model without weights."""
    model_class = CLASSES[family]
    model = load(mesh.tensor, family, folder, quantization, torch.bfloat16)
    empty = build_empty(lambda: model_class.from_config(model_class.load_config(folder)))
    shards = shards_for(empty, model_class._tp_plan, mesh.tensor.size)
    planned = plan_storage(empty, shards, mesh.tensor, torch.bfloat16, quantization)
    loaded = (part for _, tensor in saved_tensors(model) for part in held_parts(tensor))
    return sum(part.nbytes for part in loaded), sum(one.num_bytes for one in planned.values())


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_what_is_loaded_has_the_bytes_that_were_planned(
    run_ranks: Ranks, family: str, folder: Path, quantization: str | None, num_ranks: int
) -> None:
    group = Parallel(tensor=num_ranks)
    for loaded, planned in run_ranks(group, bytes_held, family, folder, quantization):
        assert loaded == planned


def test_dev_in_fp8_is_as_large_as_what_is_published() -> None:
    """One byte for each block weight, two for the rest: 33.04 GB; and a scale for each row."""
    dev = build_empty(
        lambda: Flux2Transformer2DModel(
            num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360
        )
    )
    planned = plan_storage(dev, {}, Axis(), torch.bfloat16, "fp8")
    small = [tensor for name, tensor in dev.named_parameters() if is_quantized(name)]
    num_rows = sum(len(tensor) for tensor in small)
    assert sum(tensor.numel() for tensor in small) == 31_406_948_352
    total = sum(one.num_bytes for one in planned.values())
    assert total == 31_406_948_352 + 2 * 816_332_800 + 4 * num_rows
    assert round(total / 1e9, 1) == 33.1


def test_a_weight_is_made_small_before_the_next_is_read(
    transformer_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive = Checkpoint.read, weakref.WeakSet[Tensor]()
    most = []

    def watched(checkpoint: Checkpoint, name: str, *rest: Any) -> Tensor:
        tensor = read(checkpoint, name, *rest)
        if is_quantized(name):
            alive.add(tensor)
            most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    load(Axis(), "flux2", transformer_folder("flux2"), "fp8")
    assert len(most) > 20
    assert set(most) == {1}


def agreements(mesh: Mesh, folder: Path) -> list[tuple[int, ...]]:
    """The shapes that the ranks agreed on, in order."""
    shapes, all_reduce = [], dist.all_reduce

    def noted(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return all_reduce(tensor, *rest, **options)

    dist.all_reduce = noted
    try:
        load(mesh.tensor, "flux2", folder, "fp8")
    finally:
        dist.all_reduce = all_reduce
    return shapes


def test_ranks_agree_once_for_each_weight_whose_rows_they_share(
    run_ranks: Ranks, transformer_folder: Callable[[str], Path]
) -> None:
    """Two double blocks with four such weights, two single ones with one."""
    first, second = run_ranks(Parallel(tensor=2), agreements, transformer_folder("flux2"))
    assert first == second == [(128, 1)] * 10


def test_what_diffusers_keeps_in_fp32_is_planned_and_loaded_so(tmp_path: Path) -> None:
    """FLUX.3's norms of queries and keys, whatever the rest of it is."""
    small = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)}
    config = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8, **small}
    Flux3Transformer2DModel(**config).save_pretrained(tmp_path)
    recipe = LoadSpec(Checkpoint(tmp_path), Axis(), torch.bfloat16)
    loaded = load_sharded(lambda: Flux3Transformer2DModel(**config), {}, recipe)
    theirs = Flux3Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in saved_tensors(loaded)}
    assert dtypes == {name: tensor.dtype for name, tensor in theirs.named_parameters()}
    assert {"bfloat16", "float32"} == {str(dtype)[6:] for dtype in dtypes.values()}
    planned = plan_storage(loaded, {}, Axis(), torch.bfloat16, None)
    assert {name: stored.dtype for name, stored in planned.items()} == dtypes


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_precision_that_did_not_take_effect_names_the_parameter(
    transformer_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    def kept(name: str, shape: torch.Size, *_: Any) -> Tensor:
        wide = name == "transformer_blocks.1.ff.linear_in.weight"
        return torch.zeros(shape, dtype=torch.float32 if wide else torch.bfloat16)

    monkeypatch.setattr(loading, "read_local", kept)
    if quantization:
        message = (
            r"transformer_blocks\.0\.attn\.to_q\.weight is held as torch\.bfloat16 in 32768 bytes,"
            r" not as torch\.float8_e4m3fn in 16896"
        )
    else:
        message = r"blocks\.1\.ff\.linear_in.weight is held as torch.float32 in \d+ bytes, not as"
    with pytest.raises(PrecisionNotApplied, match=message):
        load(Axis(), "flux2", transformer_folder("flux2"), quantization, torch.bfloat16)


def test_a_text_encoder_is_quantized_layer_by_layer(tmp_path: Path) -> None:
    config = Qwen3Config(**TEXT, **HEADS)
    torch.manual_seed(0)
    model = Qwen3Model(config).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    recipe = LoadSpec(Checkpoint(tmp_path), Axis(), torch.float32, quantization="fp8")
    small = load_sharded(lambda: Qwen3Model(config), config.base_model_tp_plan, recipe)
    dtypes = {name: held_parts(tensor)[0].dtype for name, tensor in small.named_parameters()}
    assert dtypes["layers.1.mlp.down_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["embed_tokens.weight"] == dtypes["norm.weight"] == torch.float32
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        ours, plain = (m(ids).last_hidden_state.numpy() for m in (small, model))
    assert 0 < relative(ours, plain) < 0.1


def test_nf4_over_ranks_is_refused_before_anything_is_read(
    transformer_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "read_local", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"quantization nf4 .* parallel\.tensor is 2"):
        load(Axis(0, 2), "flux2", transformer_folder("flux2"), "nf4")


def test_nf4_without_bitsandbytes_names_the_extra(
    transformer_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"flux-ray\[nf4\]"):
        load(Axis(), "flux2", transformer_folder("flux2"), "nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_computes_from_half_a_byte_a_weight(
    family: str,
    folder: Path,
    transformer_inputs: Callable[..., dict[str, Any]],
    dtype: torch.dtype,
) -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    model = load(Axis(), family, folder, "nf4", dtype)
    in_blocks = {name for name, part in model.named_modules() if type(part) is layers.Linear4bit}
    assert {f"{name}.weight" for name in in_blocks} == {
        name for name, _ in model.named_parameters() if is_quantized(name)
    }
    inputs = transformer_inputs(family)
    plain = forward(Mesh(), inputs, family, folder, None, torch.float32)
    small = forward(Mesh(), inputs, family, folder, "nf4", dtype)
    assert 0.001 < relative(small, plain) < 0.5


def test_stored_bytes_count_the_scales() -> None:
    assert stored_bytes((4, 64), torch.bfloat16) == 512
    assert stored_bytes((4, 64), torch.bfloat16, "fp8") == 256 + 4 * 4
    assert stored_bytes((4, 64), torch.bfloat16, "int8") == 256 + 4 * 4 + 4
    assert stored_bytes((4, 64), torch.bfloat16, "nf4") == 128 + 4 * 4 + 64
    assert precision.stored_as(
        "x_embedder.weight", (4, 64), torch.bfloat16, "fp8"
    ) == StorageFormat(torch.bfloat16, 512)
