"""A fused adapter is what diffusers fuses, on any number of ranks; what does not fit is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_ray.config.tier import Lora, Parallel
from flux_ray.parallel import load as loading
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.lora import lora_deltas
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import held_parts
from tests.ranks import Ranks

CLASSES = {
    "flux2": (Flux2Transformer2DModel, Flux2Pipeline),
    "flux1": (FluxTransformer2DModel, FluxPipeline),
}
# Column-parallel, row-parallel, packed both ways, and whole on every rank.
MODULES = {
    "flux2": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.0.ff.linear_in",
        "transformer_blocks.1.ff_context.linear_out",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.1.attn.to_out",
        "x_embedder",
    ),
    "flux1": (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.1.proj_out",
        "x_embedder",
    ),
}
# kohya's names: fused projections, whose parts are different weights in diffusers.
KOHYA = {
    "flux2": {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * 128, 128),
        "lora_unet_double_blocks_1_txt_mlp_0": (6 * 128, 128),
        "lora_unet_single_blocks_0_linear2": (128, 4 * 128),
    },
    "flux1": {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * 128, 128),
        "lora_unet_double_blocks_1_txt_mlp_0": (4 * 128, 128),
        "lora_unet_single_blocks_0_linear2": (128, 5 * 128),
    },
}
Save = Callable[..., str]


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, transformer_folder: Callable[[str], Path]) -> Path:
    return transformer_folder(family)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(tensors: dict[str, Tensor], name: str = "adapter.safetensors", **notes: Any) -> str:
        metadata = {f"transformer.{key}": value for key, value in notes.items()}
        header = {"lora_adapter_metadata": json.dumps(metadata)} if notes else None
        save_file(tensors, tmp_path / name, header)
        return str(tmp_path / name)

    return save


def factors(family: str, folder: Path, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """An adapter for some weights of the model, under diffusers' names."""
    torch.manual_seed(seed)
    model = CLASSES[family][0].from_pretrained(folder)
    tensors = {}
    for module in MODULES[family]:
        rows, columns = model.get_submodule(module).weight.shape
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return tensors


def kohya_factors(family: str) -> dict[str, Tensor]:
    """An adapter as sd-scripts writes it: alpha 2 at rank 4."""
    torch.manual_seed(2)
    tensors = {}
    for module, (rows, columns) in KOHYA[family].items():
        tensors[f"{module}.lora_down.weight"] = torch.randn(4, columns) * 0.1
        tensors[f"{module}.lora_up.weight"] = torch.randn(rows, 4) * 0.1
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return tensors


def fuse(
    axis: Axis, family: str, folder: Path, loras: list[Lora], quantization: Any = None
) -> nn.Module:
    model_class, pipeline_class = CLASSES[family]
    config = model_class.load_config(folder)
    recipe = LoadSpec(
        Checkpoint(folder),
        axis,
        torch.float32,
        deltas=lora_deltas(loras, pipeline_class),
        quantization=quantization,
    )
    return load_sharded(lambda: model_class.from_config(config), model_class._tp_plan, recipe)


def fused_by_diffusers(family: str, folder: Path, loras: list[Lora]) -> dict[str, Tensor]:
    """By `load_lora_weights` and `fuse_lora`, which need peft."""
    model_class, pipeline_class = CLASSES[family]
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    if family == "flux1":
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    pipeline = pipeline_class(transformer=model_class.from_pretrained(folder), **parts)
    names = [f"adapter{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipeline.load_lora_weights(lora.path, adapter_name=name)
    pipeline.set_adapters(names, [lora.scale for lora in loras])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    return dict(pipeline.transformer.named_parameters())


def assert_fused_alike(family: str, folder: Path, loras: list[Lora]) -> None:
    plain = CLASSES[family][0].from_pretrained(folder)
    ours = dict(fuse(Axis(), family, folder, loras).named_parameters())
    theirs = fused_by_diffusers(family, folder, loras)
    changed = 0
    for name, before in plain.named_parameters():
        error = (ours[name] - theirs[name]).abs().max()
        assert error <= 1e-5 * theirs[name].abs().max(), name
        changed += not torch.equal(ours[name], before)
    assert changed >= 3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_adapters_with_their_scales(family: str, folder: Path, save: Save) -> None:
    first = save(factors(family, folder))
    second = save(factors(family, folder, rank=2, seed=1), "second.safetensors")
    assert_fused_alike(
        family, folder, [Lora(path=first, scale=0.75), Lora(path=second, scale=-1.5)]
    )


def test_kohyas_files_with_their_alphas(family: str, folder: Path, save: Save) -> None:
    assert_fused_alike(family, folder, [Lora(path=save(kohya_factors(family)))])


@pytest.mark.parametrize(
    "notes",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {r"attn.to_[qk]": 16}},
    ],
    ids=["alpha", "rslora", "pattern"],
)
def test_the_files_notes_are_heeded(
    family: str, folder: Path, save: Save, notes: dict[str, Any]
) -> None:
    path = save(factors(family, folder), r=4, target_modules=list(MODULES[family]), **notes)
    assert_fused_alike(family, folder, [Lora(path=path)])


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_an_alpha_beside_the_factors_is_heeded(
    family: str, folder: Path, save: Save, alpha: float
) -> None:
    """diffusers knows these for FLUX.1 only; in a FLUX.2 file they mean the same."""
    tensors = factors(family, folder)
    alphas = {f"transformer.{module}.alpha": torch.tensor(alpha) for module in MODULES[family]}
    path = save(tensors | alphas)
    if family == "flux1":
        assert_fused_alike(family, folder, [Lora(path=path)])
    scaled = {key: t * alpha / 4 if "lora_B" in key else t for key, t in tensors.items()}
    baked = save(scaled, "baked.safetensors")
    ours, other = (fuse(Axis(), family, folder, [Lora(path=file)]) for file in (path, baked))
    for mine, wanted in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6)


def forward(mesh: Mesh, inputs: dict[str, Any], *what: Any) -> Any:
    model = fuse(mesh.tensor, *what)
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0].numpy()


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_add_to_their_own_slices(
    run_ranks: Ranks,
    family: str,
    folder: Path,
    save: Save,
    transformer_inputs: Callable[..., dict[str, Any]],
    num_ranks: int,
) -> None:
    loras = [
        Lora(path=save(factors(family, folder)), scale=0.5),
        Lora(path=save(kohya_factors(family), "kohya.safetensors"), scale=2),
    ]
    inputs = transformer_inputs(family)
    plain = forward(Mesh(), inputs, family, folder, [])
    one = forward(Mesh(), inputs, family, folder, loras)
    scale = np.abs(one).max()
    assert np.abs(one - plain).max() > 1e-2 * scale
    for many in run_ranks(Parallel(tensor=num_ranks), forward, inputs, family, folder, loras):
        assert np.abs(many - one).max() <= 1e-5 * scale


def test_an_adapter_is_added_before_weights_are_quantized(
    family: str, folder: Path, save: Save
) -> None:
    loras = [Lora(path=save(factors(family, folder)))]
    plain = dict(fuse(Axis(), family, folder, loras).named_parameters())
    small = dict(fuse(Axis(), family, folder, loras, "fp8").named_parameters())
    name = f"{MODULES[family][0]}.weight"
    data, scale = held_parts(small[name])
    assert data.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, plain[name].abs().amax(1, keepdim=True) / 448)


def test_the_klein_pipeline_reads_as_dev_does(
    transformer_folder: Callable[[str], Path], save: Save
) -> None:
    folder = transformer_folder("flux2")
    loras = [Lora(path=save(factors("flux2", folder)))]
    dev, klein = (lora_deltas(loras, p)[0] for p in (Flux2Pipeline, Flux2KleinPipeline))
    assert dev.factors.keys() == klein.factors.keys() == {f"{m}.weight" for m in MODULES["flux2"]}


def test_adapters_need_no_peft(
    family: str, folder: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there for tests only."""
    monkeypatch.setitem(sys.modules, "peft", None)
    fuse(Axis(), family, folder, [Lora(path=save(kohya_factors(family)))])


PAIR = {"lora_A.weight": torch.zeros(4, 128), "lora_B.weight": torch.zeros(128, 4)}


def pair(module: str) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": tensor for leaf, tensor in PAIR.items()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (pair("transformer.transformer_blocks.7.attn.to_q"), r"blocks\.7\.attn\.to_q targets"),
        (pair("transformer.proj_out"), r"transformer\.proj_out is for .*\(128, 128\).*\(16, 128\)"),
        (pair("text_encoder.layers.0.q_proj"), r"text_encoder\.layers\.0\.q_proj\.lora_"),
        (
            pair("transformer_blocks.0.attn.to_q"),
            r"transformer_blocks\.0\.attn\.to_q\.lora_A\.weight is no",
        ),
        (
            {"transformer.x_embedder.lora_magnitude_vector": torch.zeros(128)},
            "x_embedder.lora_magnitude_vector",
        ),
        ({"transformer.x_embedder.dora_scale": torch.zeros(128)}, "x_embedder.dora_scale"),
        ({"transformer.x_embedder.lora_B.bias": torch.zeros(128)}, "x_embedder.lora_B.bias"),
        ({"transformer.norm.alpha": torch.tensor(1.0)}, "norm.alpha belongs to no factor"),
        (
            {"transformer.proj_out.lora_A.weight": torch.zeros(4, 128)},
            "transformer.proj_out has not both factors",
        ),
    ],
    ids=["module", "shape", "encoder", "prefix", "magnitude", "dora", "bias", "alpha", "half"],
)
def test_a_key_without_a_place_is_refused_before_weights_are_read(
    family: str,
    folder: Path,
    save: Save,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Tensor],
    message: str,
) -> None:
    monkeypatch.setattr(loading, "read_local", lambda *_: pytest.fail("read"))
    path = save(factors(family, folder) | more)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        fuse(Axis(), family, folder, [Lora(path=path)])


@pytest.mark.parametrize("key", ["lora_unet_other_0.lora_down.weight", "lora_te1_a.lora_up.weight"])
def test_what_diffusers_would_leave_out_is_refused(
    family: str, folder: Path, save: Save, key: str
) -> None:
    path = save(kohya_factors(family) | {key: torch.ones(4, 4)})
    with pytest.raises(ValueError, match=rf"{path}.*{key}"):
        fuse(Axis(), family, folder, [Lora(path=path)])


def test_other_files_are_refused(family: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"not one")
    torch.save({"a": torch.zeros(1)}, tmp_path / "adapter.bin")
    for name in ("adapter.safetensors", "adapter.bin"):
        with pytest.raises(ValueError, match=rf"{name} is not a safetensors file"):
            fuse(Axis(), family, folder, [Lora(path=str(tmp_path / name))])
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"empty\.safetensors has no tensors"):
        fuse(Axis(), family, folder, [Lora(path=str(tmp_path / "empty.safetensors"))])
    with pytest.raises(ValueError, match=r"missing\.safetensors is not a file"):
        fuse(Axis(), family, folder, [Lora(path="missing.safetensors")])
