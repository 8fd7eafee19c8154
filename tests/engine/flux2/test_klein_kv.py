"""Klein KV computes the keys and values of references once, for all requests that have them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from torch import Tensor

from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Forward, ImageSpec, Placement
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux2.activations import kept_bytes
from flux_ray.engine.flux2.klein_kv import Flux2KleinKv
from flux_ray.request import ImageRequest, Mask, RgbImage
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.engine.generation import SEED, finish, generate_with_pipeline, reference
from tests.engine.kleins import KV

RED, GREEN = "a red circle on a blue background", "make the circle green"
# Of 4 x 4 and 6 x 4 tokens.
REFERENCES = (reference(64, 64, 1), reference(96, 64, 2))
NUM_REFERENCE = 16 + 24


@pytest.fixture(scope="module")
def adapter(kleins: dict[str, Path]) -> Flux2KleinKv:
    return Flux2KleinKv.load(str(kleins[KV.family]), Placement("float32", "cpu"), KV)


def request(
    prompt: str, width: int, height: int, seed: int, references: tuple[RgbImage, ...] = REFERENCES
) -> ImageRequest:
    return ImageRequest(
        "id", "tiny", prompt, width, height, 2, 1.0, seed=seed, references=references
    )


def generate(
    adapter: Flux2KleinKv, encoder: CachedEncoder, asked: ImageRequest
) -> tuple[Tensor, RgbImage]:
    """As a rank does: the last latents and the image."""
    given, _ = encoder.encode(asked, ())
    canvas = ImageSpec(asked.width, asked.height, asked.num_steps)
    state = finish(adapter, adapter.prepare(given, canvas, asked.seed))
    return state.latents, adapter.decode(state)


@contextmanager
def counted(adapter: Flux2KleinKv) -> Iterator[list[int]]:
    """The tokens of the image and its references in every forward."""
    num_tokens: list[int] = []
    handle = adapter.pipeline.transformer.x_embedder.register_forward_pre_hook(
        lambda _, inputs: num_tokens.append(inputs[0].shape[1])
    )
    yield num_tokens
    handle.remove()


def test_keys_are_kept_for_other_prompts_seeds_and_sizes(adapter: Flux2KleinKv) -> None:
    """The pipeline has its own keys from the first step of the very image."""
    encoder = CachedEncoder(adapter, 2**24, "cpu")
    asked = request(GREEN, 96, 80, SEED)
    with counted(adapter) as num_tokens:
        generate(adapter, encoder, request(RED, 128, 128, 3))
        latents, image = generate(adapter, encoder, asked)
    assert num_tokens == [NUM_REFERENCE, 64, 64, 30, 30]
    pipeline = Flux2KleinKVPipeline.from_pretrained(KLEIN_CHECKPOINT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = generate_with_pipeline(
        pipeline,
        GREEN,
        ImageSpec(96, 80, 2),
        REFERENCES,
        max_sequence_length=KV.text_length,
        guidance_scale=None,
    )
    assert torch.equal(latents, expected[0])
    assert image == expected[1]


def test_other_references_have_other_keys(adapter: Flux2KleinKv) -> None:
    encoder = CachedEncoder(adapter, 2**24, "cpu")
    images = []
    with counted(adapter) as num_tokens:
        for references in (REFERENCES, REFERENCES[::-1], REFERENCES[:1], ()):
            asked = request(RED, 64, 64, SEED, references)
            images.append(generate(adapter, encoder, asked)[1].rgb)
    assert num_tokens == [40, 16, 16, 40, 16, 16, 16, 16, 16, 16, 16]
    assert len(set(images)) == 4, "their order counts"


def test_images_with_keys_of_their_own_take_turns(adapter: Flux2KleinKv) -> None:
    encoder = CachedEncoder(adapter, 2**24, "cpu")
    jobs = [
        request(RED, 64, 64, 1),
        request(GREEN, 96, 64, 2, REFERENCES[:1]),
        request(RED, 64, 80, 3, ()),
    ]
    alone = [generate(adapter, encoder, asked)[0] for asked in jobs]
    states = [
        adapter.prepare(
            encoder.encode(asked, ())[0], ImageSpec(asked.width, asked.height, 2), asked.seed
        )
        for asked in jobs
    ]
    for _ in range(2):
        states = [adapter.denoise(state) for state in states]
    for state, expected in zip(states, alone, strict=True):
        assert torch.equal(state.latents, expected)


def test_what_is_kept_is_what_the_plan_counts(adapter: Flux2KleinKv) -> None:
    given, _ = CachedEncoder(adapter, 2**24, "cpu").encode(request(RED, 64, 64, 1), ())
    forward = Forward(KV.text_length, 16 + NUM_REFERENCE, Parallel(), 4, num_reference=40)
    config = adapter.pipeline.transformer.config
    num_bytes = sum(tensor.nbytes for tensor in given.references.values())
    assert num_bytes == kept_bytes(config, forward) == 2 * 8 * NUM_REFERENCE * 128 * 4
    # Nothing larger is kept alive by a view of it.
    assert num_bytes == sum(
        tensor.untyped_storage().nbytes() for tensor in given.references.values()
    )


def test_a_forward_that_fails_leaves_nothing_behind(
    adapter: Flux2KleinKv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request has attention as it was."""
    encoder = CachedEncoder(adapter, 2**24, "cpu")
    plain = request(RED, 64, 64, 1, ())
    expected = generate(adapter, encoder, plain)[0]
    last = adapter.pipeline.transformer.norm_out
    monkeypatch.setattr(last, "forward", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(adapter, encoder, request(RED, 64, 64, 1))
    monkeypatch.undo()
    assert torch.equal(generate(adapter, encoder, plain)[0], expected)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_mask_keeps_the_rest(adapter: Flux2KleinKv, strength: float) -> None:
    """diffusers has no such pipeline; its inpainting is the same for any kind of klein."""
    encoder = CachedEncoder(adapter, 2**24, "cpu")
    whole = Mask(96, 64, b"\xff" * (96 * 64))
    asked = request(GREEN, 96, 64, SEED, REFERENCES[::-1])
    plain = generate(adapter, encoder, asked)
    everything = generate(adapter, encoder, replace(asked, mask=whole))
    assert torch.equal(everything[0], plain[0]) and everything[1] == plain[1]

    left = Mask(96, 64, (b"\xff" * 48 + bytes(48)) * 64)
    half = replace(asked, mask=left)
    given, _ = encoder.encode(half, ())
    canvas = ImageSpec(96, 64, 2, strength=strength)
    state = adapter.prepare(given, canvas, SEED)
    assert state.step == (0 if strength == 1 else 1)
    state = finish(adapter, state)
    edit = state.conditioning.edit
    assert edit is not None
    kept = edit.tensors["weights"][0, :, 0] == 0
    assert torch.equal(state.latents[0, kept], edit.tensors["latents"][0, kept])
    marked = torch.frombuffer(bytearray(left.marks), dtype=torch.uint8).view(64, 96) > 0
    before, after = (
        torch.frombuffer(bytearray(each.rgb), dtype=torch.uint8).view(64, 96, 3)
        for each in (REFERENCES[1], adapter.decode(state))
    )
    assert torch.equal(before[~marked], after[~marked])
    assert (before[marked] != after[marked]).any()
