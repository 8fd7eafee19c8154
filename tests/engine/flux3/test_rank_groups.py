"""A rank group generates what one rank does; what FLUX.3 cannot do is refused before loading."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Lora, Parallel
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux3.transformer import PLAN
from flux_ray.engine.registry import empty_model, load_adapter, load_prompt_encoder
from flux_ray.engine.shard import write_shards
from flux_ray.parallel import load as loading
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.mesh import Axis, Mesh
from flux_ray.parallel.precision import held_parts, is_quantized
from tests.engine.flux3.modular import generate
from tests.engine.generation import reference
from tests.ranks import Ranks

KLEIN, BASE = "flux-3-klein", "flux-3-klein-base"


@dataclass(frozen=True)
class Generated:
    """What a rank generated, and the bytes that it held of the transformer."""

    latents: list[Any]
    images: list[Any]
    num_bytes: int


def generate_all(mesh: Mesh, tier: str, weights: Path, **options: Any) -> Generated:
    torch.set_num_threads(1)
    placement = Placement("float32", "cpu", mesh, **options)
    adapter = load_adapter(tier_for(tier), str(weights), placement)
    canvas = ImageSpec(112, 80, 2, true_cfg_scale=3.5)
    negative = "" if tier == BASE else None
    cases = [(), (reference(100, 70, 3),), (reference(64, 64, 1), reference(80, 100, 2))]
    generated = [generate(adapter, canvas, references, negative) for references in cases]
    parts = [part for each in adapter.transformer.parameters() for part in held_parts(each)]
    return Generated(
        [latents.numpy() for latents, _ in generated],
        [np.frombuffer(image.rgb, np.uint8).astype(int) for _, image in generated],
        sum(part.nbytes for part in parts),
    )


@pytest.mark.parametrize(
    ("num_ranks", "tier"),
    [(2, KLEIN), (2, BASE), pytest.param(4, KLEIN, marks=pytest.mark.slow)],
)
def test_every_rank_has_the_latents_and_the_image_of_one_rank(
    run_ranks: Ranks, small_flux3: Callable[[str], Path], num_ranks: int, tier: str
) -> None:
    folder = small_flux3(tier)
    one = generate_all(Mesh(), tier, folder)
    for rank in run_ranks(Parallel(tensor=num_ranks), generate_all, tier, folder):
        for latents, expected in zip(rank.latents, one.latents, strict=True):
            assert abs(latents - expected).max() <= 1e-5 * abs(expected).max()
        for image, expected in zip(rank.images, one.images, strict=True):
            assert abs(image - expected).max() <= 1
        assert rank.num_bytes < one.num_bytes * (0.65 if num_ranks == 2 else 0.5)


def held(mesh: Mesh, folder: Path, quantization: Any) -> dict[str, list[Any]]:
    """What a rank holds of each parameter, its data's bytes and its scales."""
    placement = Placement("bfloat16", "cpu", mesh, quantization=quantization, text_encoder="shared")
    adapter = load_adapter(tier_for(KLEIN), str(folder), placement)
    return {
        name: [part.view(torch.uint8).numpy() for part in held_parts(parameter)]
        for name, parameter in adapter.transformer.named_parameters()
    }


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_the_quantized_bytes_of_two_ranks_are_the_slices_of_one(
    run_ranks: Ranks, small_flux3: Callable[[str], Path], quantization: str
) -> None:
    """Of the linears of all blocks: those of text, of image, of references, and the joint ones."""
    folder = small_flux3(KLEIN)
    whole = held(Mesh(), folder, quantization)
    empty = empty_model(tier_for(KLEIN), str(folder)).transformer
    shards = shards_for(empty, PLAN, 2)
    split = {name for name in shards if is_quantized(name)}
    assert split == {name for name, parts in whole.items() if len(parts) > 1}
    for rank, parts in enumerate(run_ranks(Parallel(tensor=2), held, folder, quantization)):
        for name in split:
            shard, axis = shards[name], Axis(rank, 2)
            data, *scales = (torch.from_numpy(part) for part in whole[name])
            expected = [shard.take(data, axis)]
            expected += [shard.take(s, axis) if shard.dim == 0 else s for s in scales]
            for part, wanted in zip(parts[name], expected, strict=True):
                assert np.array_equal(part, wanted.numpy()), name


def test_rank_files_hold_what_ranks_would_cut_themselves(
    run_ranks: Ranks, small_flux3: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, split = small_flux3(KLEIN), tmp_path / "split"
    write_shards(tier_for(KLEIN), str(folder), Parallel(tensor=2), "shared", split, lambda _: None)
    cut, read = (run_ranks(Parallel(tensor=2), held, each, None) for each in (folder, split))
    for ours, theirs in zip(cut, read, strict=True):
        assert ours.keys() == theirs.keys()
        for name, [part] in ours.items():
            assert np.array_equal(part, theirs[name][0]), name


def save_lora(file: Path, prefix: str, names: dict[str, tuple[int, int]]) -> None:
    dice = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (num_out, num_in) in names.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(2, num_in, generator=dice)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(num_out, 2, generator=dice)
    save_file(tensors, file)


OURS = {
    "txt_mode_blocks.0.attn.to_q": (64, 64),
    "mode_blocks.image.1.ff.linear_in": (384, 64),
    "single_transformer_blocks.1.attn.to_out.0": (64, 64),
}
# The same layers under the names of BFL's own code, which trainers save.
THEIRS = {
    "txt_mode_blocks.0.q_proj": (64, 64),
    "content_mode_blocks.image.1.mlp_in": (384, 64),
    "single_blocks.1.attn_out": (64, 64),
}


def test_a_lora_of_either_naming_is_added_and_split(
    run_ranks: Ranks, small_flux3: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_flux3(KLEIN)
    save_lora(tmp_path / "ours.safetensors", "transformer.", OURS)
    save_lora(tmp_path / "theirs.safetensors", "diffusion_model.", THEIRS)
    ours, theirs = (
        {"loras": (Lora(path=str(tmp_path / f"{name}.safetensors"), scale=0.1),)}
        for name in ("ours", "theirs")
    )

    def with_lora(mesh: Mesh, options: dict[str, Any]) -> Generated:
        return generate_all(mesh, KLEIN, folder, **options)

    one = with_lora(Mesh(), ours)
    again = with_lora(Mesh(), theirs)
    assert all(np.array_equal(a, b) for a, b in zip(one.latents, again.latents, strict=True))
    plain = generate_all(Mesh(), KLEIN, folder).latents[0]
    assert abs(one.latents[0] - plain).max() > 0.01 * abs(plain).max()
    for rank in run_ranks(Parallel(tensor=2), with_lora, ours):
        for latents, expected in zip(rank.latents, one.latents, strict=True):
            assert abs(latents - expected).max() <= 1e-5 * abs(expected).max()


def test_a_lora_that_diffusers_does_not_convert_is_refused_by_name(
    small_flux3: Callable[[str], Path], tmp_path: Path
) -> None:
    save_lora(tmp_path / "kohya.safetensors", "lora_unet_", {"single_blocks_0_q_proj": (64, 64)})
    lora = Lora(path=str(tmp_path / "kohya.safetensors"), scale=1.0)
    placement = Placement("float32", "cpu", loras=(lora,), text_encoder="shared")
    with pytest.raises(ValueError, match=r"kohya\.safetensors: lora_unet_single_blocks_0_q_proj"):
        load_adapter(tier_for(KLEIN), str(small_flux3(KLEIN)), placement)


def copy_of(folder: Path, to: Path, **index: str) -> Path:
    """The same checkpoint with another index."""
    shutil.copytree(folder, to)
    if index:
        (to / "modular_model_index.json").write_text(json.dumps(index))
    return to


@pytest.fixture
def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "read_local", lambda *_: pytest.fail("read"))


@pytest.mark.usefixtures("read_nothing")
def test_weights_of_another_kind_are_refused_before_they_are_read(
    small_flux3: Callable[[str], Path], tmp_path: Path
) -> None:
    laptop = Placement("float32", "cpu")
    for load in (load_adapter, load_prompt_encoder):
        message = "for Flux3ModularPipeline, not Flux3DistilledModularPipeline"
        with pytest.raises(ValueError, match=message):
            load(tier_for(KLEIN), str(small_flux3(BASE)), laptop)
        message = "for Flux3DistilledModularPipeline, not Flux3ModularPipeline"
        with pytest.raises(ValueError, match=message):
            load(tier_for(BASE), str(small_flux3(KLEIN)), laptop)
    name = "Flux3DistilledModularPipeline"
    mixed = copy_of(small_flux3(BASE), tmp_path / "mixed", _class_name=name)
    with pytest.raises(ValueError, match=f"flow_map false, which does not fit {name}"):
        load_adapter(tier_for(KLEIN), str(mixed), laptop)


@pytest.mark.usefixtures("read_nothing")
def test_what_a_checkpoint_lacks_is_named(
    small_flux3: Callable[[str], Path], tmp_path: Path
) -> None:
    """A modular index may point to other repositories, which are not followed."""
    folder = copy_of(small_flux3(KLEIN), tmp_path / "parts")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ValueError, match="have no folder text_encoder: put all components"):
        load_adapter(tier_for(KLEIN), str(folder), Placement("float32", "cpu"))
    (folder / "modular_model_index.json").unlink()
    with pytest.raises(ValueError, match=r"no model_index\.json or modular_model_index\.json"):
        load_adapter(tier_for(KLEIN), str(folder), Placement("float32", "cpu"))


@pytest.mark.usefixtures("read_nothing")
@pytest.mark.parametrize(
    ("mesh", "options", "why"),
    [
        (Mesh(Axis(0, 2), Axis(), Axis(0, 2)), {}, "cannot split its tokens over ranks"),
        (Mesh(Axis(0, 3), Axis(0, 3), Axis()), {}, "heads"),
        (Mesh(Axis(0, 2), Axis(0, 2), Axis()), {"quantization": "nf4"}, "nf4"),
    ],
    ids=["sequence", "heads", "nf4"],
)
def test_a_split_that_is_impossible_is_refused_before_anything_is_read(
    small_flux3: Callable[[str], Path], mesh: Mesh, options: dict[str, Any], why: str
) -> None:
    placement = Placement("float32", "cpu", mesh, **options)
    with pytest.raises(ValueError, match=why):
        load_adapter(tier_for(KLEIN), str(small_flux3(KLEIN)), placement)
