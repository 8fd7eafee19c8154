"""What is alike at every step of an image is computed once, and gives the same bits."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Conditioning, ImageSpec, ImageState, Placement
from flux_ray.engine.flux2.pipeline import Flux2, unpack_latents
from flux_ray.engine.registry import load_adapter
from flux_ray.parallel.mesh import Mesh
from flux_ray.request import Mask, RgbImage
from tests.engine.generation import SEED, finish, reference
from tests.ranks import Ranks

PROMPT = "a red circle on a blue background"
# 35, and 24 + 16 tokens: two ranks need a pad, and none.
JOBS: list[tuple[ImageSpec, tuple[RgbImage, ...], Mask | None]] = [
    (ImageSpec(112, 80, 3, guidance=4.0), (), None),
    (ImageSpec(96, 64, 3, guidance=4.0), (reference(64, 64, 1),), None),
    (ImageSpec(96, 64, 3), (reference(96, 64, 3),), Mask(96, 64, (b"\xff" * 48 + bytes(48)) * 64)),
]


@contextmanager
def counted(adapter: Flux2) -> Iterator[list[int]]:
    """The tokens of every call of the model's own rotary embedder."""
    num_tokens: list[int] = []
    handle = adapter.rotary.embedder.register_forward_pre_hook(
        lambda _, inputs: num_tokens.append(inputs[0].shape[0])
    )
    yield num_tokens
    handle.remove()


def condition(
    adapter: Flux2, references: tuple[RgbImage, ...], mask: Mask | None = None
) -> Conditioning:
    given = adapter.encode(adapter.encode_prompt(PROMPT), references)
    return given if mask is None else adapter.edit(given, references[0], mask)


def with_ids(state: ImageState) -> ImageState:
    """The same image, for which the transformer builds its tables at every step."""
    given, ids = state.conditioning, state.fixed["latent_ids"]
    if given.references:
        ids = torch.cat([ids, given.references["ids"]], dim=1)
    fixed = {
        **state.fixed,
        "text_rotary": given.prompt.tensors["text_ids"],
        "image_rotary": ids,
    }
    return replace(state, fixed=fixed)


def test_rotary_tables_are_built_once_per_image(klein_adapter: Flux2) -> None:
    given = condition(klein_adapter, (reference(64, 64, 1),))
    canvas = ImageSpec(96, 64, num_steps=4)
    with counted(klein_adapter) as num_tokens:
        for seed in (1, 2):
            finish(klein_adapter, klein_adapter.prepare(given, canvas, seed))
        assert num_tokens == [48, 24 + 16] * 2
        finish(klein_adapter, with_ids(klein_adapter.prepare(given, canvas, 3)))
        assert len(num_tokens) == 6 + 2 * canvas.num_steps


def test_every_step_gets_the_same_tensors(klein_adapter: Flux2) -> None:
    names = ("txt_ids", "img_ids", "guidance")
    given: list[tuple[Tensor, ...]] = []
    hook = klein_adapter.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, inputs: given.append(tuple(inputs[name] for name in names)),
        with_kwargs=True,
    )
    conditioning = condition(klein_adapter, (reference(64, 64, 1),))
    finish(klein_adapter, klein_adapter.prepare(conditioning, ImageSpec(64, 64, 4), SEED))
    hook.remove()
    assert len(given) == 4
    assert all(one is other for step in given for one, other in zip(given[0], step, strict=True))


def test_tables_go_with_their_image(klein_adapter: Flux2) -> None:
    state = klein_adapter.prepare(condition(klein_adapter, ()), ImageSpec(64, 64, 2), SEED)
    table = weakref.ref(state.fixed["image_rotary"])
    image = klein_adapter.decode(finish(klein_adapter, state))
    del state
    gc.collect()
    assert image.width == 64 and table() is None


def test_images_that_take_turns_keep_their_own_tables(klein_adapter: Flux2) -> None:
    """Parked after each step for one of another size, and resumed."""
    given = [condition(klein_adapter, job[1], job[2]) for job in JOBS]
    states = [
        klein_adapter.prepare(each, job[0], SEED) for each, job in zip(given, JOBS, strict=True)
    ]
    expected = [finish(klein_adapter, state).latents for state in states]
    for _ in range(3):
        states = [klein_adapter.denoise(state) for state in states]
    for state, latents in zip(states, expected, strict=True):
        assert torch.equal(state.latents, latents)


def test_unpacking_asks_the_device_for_nothing(klein_adapter: Flux2) -> None:
    """On the meta device there are no ids to take a size from."""
    state = klein_adapter.prepare(condition(klein_adapter, ()), ImageSpec(112, 80, 1), SEED)
    on_meta = {name: tensor.to("meta") for name, tensor in state.fixed.items()}
    absent = replace(state, latents=state.latents.to("meta"), fixed=on_meta)
    num_channels = state.latents.shape[-1]
    assert unpack_latents(absent).shape == (1, num_channels, 5, 7)
    # Row by row, as tokens are packed.
    plain = state.latents[0].T.reshape(num_channels, 5, 7)
    assert torch.equal(unpack_latents(state)[0], plain)


def generate_both(mesh: Mesh, tier: str, weights: str) -> list[tuple[Any, Any, list[int]]]:
    """With tables and with ids, and the calls of the embedder for the former."""
    torch.set_num_threads(1)
    adapter = load_adapter(tier_for(tier), weights, Placement("float32", "cpu", mesh))
    assert isinstance(adapter, Flux2)
    generated = []
    for canvas, references, mask in JOBS:
        given = condition(adapter, references, mask)
        with counted(adapter) as num_tokens:
            once = finish(adapter, adapter.prepare(given, canvas, SEED)).latents
        each_step = finish(adapter, with_ids(adapter.prepare(given, canvas, SEED))).latents
        generated.append((once.numpy(), each_step.numpy(), num_tokens))
    return generated


LAYOUTS = {"TP2": Parallel(tensor=2), "SP2": Parallel(sequence=2)}


@pytest.mark.parametrize(
    "parallel",
    [
        # Ranks that share the weights have all ids, like one rank.
        pytest.param(LAYOUTS["TP2"], id="TP2", marks=pytest.mark.slow),
        pytest.param(LAYOUTS["SP2"], id="SP2"),
    ],
)
def test_a_group_with_tables_generates_the_bits_of_one_with_ids(
    run_ranks: Ranks, small_dev: Path, parallel: Parallel
) -> None:
    for rank in run_ranks(parallel, generate_both, "flux-2-dev", str(small_dev)):
        for once, each_step, num_tokens in rank:
            assert np.array_equal(once, each_step)
            assert len(num_tokens) == 2
