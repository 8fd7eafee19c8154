"""Memory that runs out under a request costs that request, and no other."""

import asyncio
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import OutOfMemory, ReplicaFailed
from flux_ray.replica import rank_group as group_module
from flux_ray.replica.process import is_out_of_memory
from flux_ray.replica.rank import RankActor
from flux_ray.replica.rank_group import RankGroup
from flux_ray.replica.step_loop import StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks
from flux_ray.replica.transport import StageFailed
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import ImageRequest, last_of
from flux_ray.stages import Encoded, StageAnswer

torch.set_num_threads(1)
ARGS = TierArgs(tier="tiny", device="cpu", dtype="float32")
REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 96, num_steps=2, guidance=1.0, seed=5)
SIZES = (64 * 96, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_what_is_no_more_than_a_lack_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_torch_says_so_where_the_machine_has_no_more() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


def loaded(**changes: Any) -> RankActor:
    rank = RankActor(0, ARGS.model_copy(update=changes))
    rank.load(rank.create_store())
    return rank


@pytest.fixture(scope="module")
def rank() -> RankActor:
    return loaded()


STAGES = ("encode", "prepare", "denoise", "denoise", "decode")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA has 3 MB"), MemoryError()])
@pytest.mark.parametrize("stage", ["encode", "prepare", "denoise", "decode"])
def test_the_same_process_generates_the_next_image(
    rank: RankActor, monkeypatch: pytest.MonkeyPatch, error: Exception, stage: str
) -> None:
    expected = rank.run(1, STAGES, REQUEST)[-1].value
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(*args: object) -> None:
        large = torch.zeros(2**20)
        held.append(weakref.ref(large))
        raise error

    emptied: list[str] = []
    monkeypatch.setattr("flux_ray.replica.rank.free_memory", emptied.append)
    with monkeypatch.context() as patch:
        patch.setattr(rank._adapter, "encode_prompt" if stage == "encode" else stage, fail)
        asked = replace(REQUEST, prompt="a blue square", width=128)
        with pytest.raises(OutOfMemory, match="smaller width and height"):
            rank.run(2, STAGES, asked)
        with pytest.raises(OutOfMemory):
            rank.run(2, ("decode",))  # It was sent before the leader heard.
    assert emptied == ["cpu"]
    assert [each() for each in held] == [None], "not even by its traceback"
    rank.run(2, ("drop",))
    assert (rank._jobs, rank._mistakes) == ({}, {})
    assert rank.run(3, STAGES, REQUEST)[-1].value == expected


def test_what_was_remembered_makes_room(rank: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_known(job: int) -> bool:
        answers = rank.run(job, STAGES, REQUEST)
        assert isinstance(answers[0].value, Encoded)
        return answers[0].value.is_cached

    assert (is_known(1), is_known(2)) == (False, True) or is_known(2)

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(rank._adapter, "denoise", fail)
        with pytest.raises(OutOfMemory):
            rank.run(3, STAGES, REQUEST)
    rank.run(3, ("drop",))
    assert not is_known(4)


def test_a_card_gives_back_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_ray.replica.process import free_memory

    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(gc.isenabled()))
    free_memory("cpu")
    assert not emptied
    free_memory("cuda")
    assert emptied


def test_another_error_still_ends_the_rank(
    rank: RankActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(rank._adapter, "denoise", fail)
    with pytest.raises(StageFailed):
        rank.run(1, STAGES, REQUEST)
    rank.run(1, ("drop",))


class Line:
    """A rank of a group. What it answers to each stage is told by `answers`, else it hangs."""

    def __init__(self, answers: dict[str, object]) -> None:
        self.answers = answers

    def call(self, frame: bytes) -> asyncio.Future[Any]:
        import pickle

        _, stages, *_ = pickle.loads(frame[8:])
        answer = asyncio.get_running_loop().create_future()
        given = [self.answers.get(stage, "hang") for stage in stages]
        failed = [each for each in given if isinstance(each, Exception)]
        if failed:
            answer.set_exception(failed[0])
        elif "hang" not in given:
            answer.set_result([StageAnswer(each, 0.1) for each in given])
        return answer

    async def ping(self) -> int:
        return 1

    async def live(self) -> None:
        await asyncio.Event().wait()


FINE: dict[str, object] = {"encode": Encoded((), is_cached=False), "prepare": None}
LACKING = OutOfMemory("too large")


class Replica:
    """A group of such ranks with its step loop; `ended` is set when its process would end."""

    def __init__(self, *ranks: dict[str, object]) -> None:
        self.ended = asyncio.Event()
        watchdog = StepWatchdog(60, 60)
        self.group = RankGroup([Line(each) for each in ranks], watchdog, self.ended.set)
        self.loop = StepLoop(self.group, EncodedByRanks(), lambda stage, seconds: None)


async def test_of_one_rank_the_process_lives_on() -> None:
    answers = FINE | {"denoise": LACKING, "drop": None}
    replica = Replica(answers)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            await last_of(replica.loop.stream(REQUEST))
    assert not replica.ended.is_set()


async def test_of_several_ranks_the_caller_is_told_before_the_group_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others may be in a collective, and never answer."""
    monkeypatch.setattr(group_module, "LAST_WORDS_S", 0.2)
    replica = Replica(FINE, FINE | {"denoise": LACKING})
    too_large = asyncio.ensure_future(last_of(replica.loop.stream(REQUEST)))
    waiting = asyncio.ensure_future(last_of(replica.loop.stream(REQUEST)))
    with pytest.raises(OutOfMemory) as caught:
        await too_large
    assert type(caught.value) is OutOfMemory
    assert not replica.ended.is_set(), "what it said is still on its way"
    later = asyncio.ensure_future(last_of(replica.loop.stream(REQUEST)))
    await asyncio.sleep(0.05)
    assert not waiting.done() and not later.done(), "they would be sent here again"
    async with asyncio.timeout(5):
        await replica.ended.wait()
        for each in (waiting, later):
            with pytest.raises(ReplicaFailed, match="ran out of memory"):
                await each


def test_among_several_ranks_nothing_is_freed(
    rank: RankActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are out of step; whoever remembers less than the others would wait for them."""

    def fail(*args: object) -> None:
        raise MemoryError

    emptied: list[str] = []
    monkeypatch.setattr("flux_ray.replica.rank.free_memory", emptied.append)
    monkeypatch.setattr(rank._adapter, "denoise", fail)
    monkeypatch.setattr(rank, "_args", ARGS.model_copy(update={"parallel": Parallel(tensor=2)}))
    with pytest.raises(OutOfMemory):
        rank.run(1, STAGES, REQUEST)
    rank.run(1, ("drop",))
    assert not emptied
