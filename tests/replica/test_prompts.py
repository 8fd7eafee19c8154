"""A shared text encoder, asked through a handle that is a plain object: its failures are ours."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from flux_ray.errors import BadRequest, FluxError, ReplicaFailed
from flux_ray.replica.text_encoder import EncodedByRanks, EncodedElsewhere
from flux_ray.stages import EncodedPrompt, PackedTensor

ENCODED = EncodedPrompt((("embeds", PackedTensor(b"\0\0", (1, 1), "bfloat16")),))


def raised_there(error: Exception) -> Exception:
    return RayTaskError("encode_prompt", "traceback", error).as_instanceof_cause()


class Call:
    """A handle's method: `remote` gives something to await."""

    def __init__(self, answer: Callable[..., Awaitable[object]]) -> None:
        self.remote = answer


class FakeHandle:
    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.encode_prompt = Call(self._encode)

    async def _encode(self, prompt: str) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "hang":
            await asyncio.Event().wait()
        return self.answer


def elsewhere(answer: object) -> EncodedElsewhere:
    return EncodedElsewhere(FakeHandle(answer), timeout_s=0.1)


async def test_its_own_text_encoder_needs_nothing() -> None:
    assert await EncodedByRanks().encode_prompts(("a ring",)) == ()


async def test_the_answer_is_what_the_ranks_need() -> None:
    prompts = elsewhere(ENCODED)
    await prompts.wait_until_loaded()
    assert await prompts.encode_prompts(("a ring", "a disc")) == (ENCODED, ENCODED)


@pytest.mark.parametrize(
    "answer",
    [
        ActorDiedError(),
        DeploymentUnavailableError.__new__(DeploymentUnavailableError),
        raised_there(KeyError("a bug")),
        "hang",
    ],
    ids=["dead", "not there", "a bug", "hung"],
)
async def test_its_failures_are_a_replicas(answer: object) -> None:
    with pytest.raises(ReplicaFailed, match="the text encoder"):
        await elsewhere(answer).encode_prompts(("a ring",))


async def test_its_word_on_a_callers_mistake_is_passed_on() -> None:
    error = raised_there(BadRequest("no such words", "prompt"))
    with pytest.raises(FluxError) as caught:
        await elsewhere(error).encode_prompts(("a ring",))
    assert type(caught.value) is BadRequest, "without Ray's wrapping"
