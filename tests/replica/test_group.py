"""The rank group over ranks that are plain objects: agreement, and every way to break."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import RayTaskError

from flux_ray.errors import BadReference, ReplicaFailed
from flux_ray.replica.group import RankGroup


def raised_by_a_rank(error: Exception) -> Exception:
    """As it arrives at the caller of an actor."""
    return RayTaskError("encode", "traceback", error).as_instanceof_cause()


class Call:
    """An actor's method: `remote` gives something to await."""

    def __init__(self, answer: Callable[..., Awaitable[object]]) -> None:
        self.remote = answer


class FakeRank:
    """`encode` answers, or raises, what it is told to; `die` ends it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.encode, self.ping, self.live = Call(self._encode), Call(self._ping), Call(self._live)
        self._death = asyncio.Event()

    async def _encode(self, job: int) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "hang":
            await asyncio.Event().wait()
        return self.answer

    async def _ping(self) -> int:
        return 1

    async def _live(self) -> None:
        await self._death.wait()
        raise RuntimeError("as Ray's ActorDiedError")

    def die(self) -> None:
        self._death.set()


class Replica:
    """A group of fakes; `ended` counts how often it would have ended its process."""

    def __init__(self, *answers: object) -> None:
        self.ranks = [FakeRank(answer) for answer in answers]
        self.ended = 0
        self.group = RankGroup(self.ranks, step_timeout_s=0.2, end=self.end)

    def end(self) -> None:
        self.ended += 1


async def test_rank_0_answers_for_all() -> None:
    replica = Replica("picture", None, None)
    assert await replica.group.call("encode", 1) == "picture"
    await replica.group.ping()
    assert replica.ended == 0


async def test_a_mistake_that_all_ranks_see_is_the_callers() -> None:
    error = raised_by_a_rank(BadReference("too small", "image"))
    replica = Replica(error, error)
    with pytest.raises(BadReference) as caught:
        await replica.group.call("encode", 1)
    assert type(caught.value) is BadReference, "without Ray's wrapping"
    assert replica.ended == 0


@pytest.mark.parametrize(
    "answers",
    [
        (None, raised_by_a_rank(BadReference("too small", "image"))),
        (raised_by_a_rank(KeyError("a bug")), raised_by_a_rank(KeyError("a bug"))),
        (None, "hang"),
    ],
    ids=["a mistake that one rank sees", "a bug", "a rank that hangs"],
)
async def test_anything_else_ends_the_group(answers: tuple[object, ...]) -> None:
    replica = Replica(*answers)
    for _ in range(2):
        with pytest.raises(ReplicaFailed):
            await replica.group.call("encode", 1)
    assert replica.ended == 1


async def test_a_death_is_seen_while_nothing_runs() -> None:
    replica = Replica(None, None)
    await asyncio.sleep(0)
    replica.ranks[1].die()
    for _ in range(5):
        await asyncio.sleep(0)
    assert replica.ended == 1


async def test_a_death_fails_the_call_that_would_hang() -> None:
    replica = Replica(None, "hang")
    replica.group._step_timeout_s = 60
    asyncio.get_running_loop().call_later(0.05, replica.ranks[1].die)
    with pytest.raises(ReplicaFailed, match="a rank died"):
        await replica.group.call("encode", 1)
