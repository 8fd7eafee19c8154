"""The shared text encoder without Serve: the same embeddings, and an end instead of a limp."""

import time
from collections.abc import Callable

import pytest
import torch

from flux_ray.config.tier import TierArgs
from flux_ray.engine.packing import unpack
from flux_ray.errors import BadRequest, OutOfMemory
from flux_ray.replica import text_encoder
from flux_ray.replica.rank import RankActor
from flux_ray.replica.text_encoder import TextEncoder
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import ImageRequest

ARGS = TierArgs(tier="tiny", device="cpu", dtype="float32", text_encoder="shared")
REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=1, guidance=1.0, seed=5)
Ending = type("Ending", (Exception,), {})


async def started(args: TierArgs = ARGS) -> TextEncoder:
    # What Serve does; Python's own call would not await it.
    encoder = TextEncoder.__new__(TextEncoder)
    await encoder.__init__(args)  # type: ignore[misc]
    return encoder


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process, as an exception."""

    def end() -> None:
        raise Ending

    monkeypatch.setattr(text_encoder, "end_process", end)


async def test_ranks_without_one_hold_what_ranks_with_one_would() -> None:
    encoded = await (await started()).encode_prompt(REQUEST.prompt)
    colocated, shared = (
        RankActor(0, ARGS.model_copy(update={"text_encoder": kind}))
        for kind in ("colocated", "shared")
    )
    for rank in (colocated, shared):
        rank.load(rank.create_store())
    colocated.run(1, ("encode",), REQUEST)
    shared.run(1, ("encode",), REQUEST, (encoded,))
    embeds = [rank._jobs[1].conditioning.prompt.tensors["embeds"] for rank in (colocated, shared)]
    assert torch.equal(*embeds)
    assert torch.equal(embeds[0], unpack(encoded, "cpu").tensors["embeds"])
    assert shared._adapter.prompts is None, "its memory is saved"


def raising(error: Exception) -> Callable[[str], None]:
    def encode(prompt: str) -> None:
        raise error

    return encode


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize(
    ("encode", "expected"),
    [
        (raising(BadRequest("no such words", "prompt")), BadRequest),
        (raising(torch.OutOfMemoryError("CUDA")), OutOfMemory),
        (raising(RuntimeError("CUDA error: unspecified launch failure")), Ending),
        (lambda prompt: time.sleep(0.3), Ending),
    ],
    ids=["a caller's mistake", "too much", "an error", "hung"],
)
async def test_only_what_one_prompt_did_leaves_it_alive(
    monkeypatch: pytest.MonkeyPatch, encode: Callable[[str], None], expected: type[Exception]
) -> None:
    encoder = await started()
    encoder._watchdog = StepWatchdog(floor_s=0.1, limit_s=0.1)
    monkeypatch.setattr(encoder, "_encode", encode)
    with pytest.raises(expected):
        await encoder.encode_prompt("a ring")
    encoder._thread.shutdown()
