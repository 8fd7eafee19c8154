"""The rank group over ranks that are plain objects: agreement, and every way to break."""

import asyncio
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from flux_ray import liveness
from flux_ray.errors import BadReference, KilledForMemory, ReplicaFailed
from flux_ray.replica import process, rank_group
from flux_ray.replica.rank_group import RankGroup
from flux_ray.replica.transport import SIZE, StageFailed
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.stages import Encoded, StageAnswer

SIZES = (64 * 64, 0)
MISTAKE = BadReference("too small", "image")
BUG = StageFailed("KeyError: 'a bug'")


class FakeRank:
    """Calls are answered, or raise, as it is told to, one by one; `die` ends it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self._death = asyncio.Event()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._working = asyncio.Lock()

    def call(self, frame: bytes) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._run(*pickle.loads(frame[SIZE.size :])))

    async def _run(self, job: int, stages: tuple[str, ...]) -> list[StageAnswer]:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "hang":
            await asyncio.Event().wait()
        if self.answer == "slow":
            async with self._working:
                await asyncio.sleep(0.15)
        # A tenth of a second, it says, whatever the clock says.
        return [StageAnswer(self.answer, 0.1) for _ in stages]

    async def ping(self) -> int:
        await self._goes_on.wait()
        return 41_234

    async def live(self) -> Exception:
        await self._death.wait()
        return self._cause

    def die(self, cause: Exception | None = None) -> None:
        self._cause = cause or RuntimeError("of a cold")
        self._death.set()

    def stop(self) -> None:
        """As SIGSTOP does."""
        self._goes_on.clear()


class Replica:
    """A group of fakes; `ended` counts how often it would have ended its process."""

    def __init__(self, *answers: object, floor_s: float = 0.2) -> None:
        self.ranks = [FakeRank(answer) for answer in answers]
        self.ended = 0
        self.has_ended = asyncio.Event()
        self.watchdog = StepWatchdog(floor_s, limit_s=10)
        self.watchdog.learn(0.001, "encode", SIZES)
        self.group = RankGroup(self.ranks, self.watchdog, end=self.end)

    def end(self) -> None:
        self.ended += 1
        self.has_ended.set()

    async def encode(self) -> object:
        async with asyncio.timeout(5):
            (answer,) = await self.group.run(1, ("encode",), SIZES)
            return answer.value


async def test_rank_0_answers_for_all() -> None:
    replica = Replica("image", None, None)
    assert await replica.encode() == "image"
    replica.group.check()
    assert replica.ended == 0


async def test_a_check_of_its_health_waits_for_no_rank() -> None:
    """A leader that waited for one that hangs would itself be taken for one, and ended."""
    replica = Replica(None, None)
    replica.ranks[1].stop()
    replica.group.check()
    replica.group.break_up("rank 1 hangs")
    with pytest.raises(ReplicaFailed, match="rank 1 hangs"):
        replica.group.check()


async def test_a_mistake_that_all_ranks_see_is_the_callers() -> None:
    replica = Replica(MISTAKE, MISTAKE, MISTAKE)
    with pytest.raises(BadReference) as caught:
        await replica.encode()
    assert type(caught.value) is BadReference
    assert replica.ended == 0


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ((None, MISTAKE), "some ranks only: too small"),
        ((MISTAKE, None), "some ranks only: too small"),
        ((BUG, BUG), "failed on a rank: KeyError: 'a bug'"),
        ((None, "hang"), "took longer than 0.2 s"),
    ],
    ids=["a mistake that rank 1 sees", "a mistake that rank 0 sees", "a bug", "a rank that hangs"],
)
async def test_anything_else_ends_the_group(answers: tuple[object, ...], reason: str) -> None:
    replica = Replica(*answers)
    for _ in range(2):
        with pytest.raises(ReplicaFailed, match=reason):
            await replica.encode()
    assert replica.ended == 1


@pytest.mark.parametrize("answers", [("hang", BUG), (BUG, "hang", None)])
async def test_a_bug_on_one_rank_is_not_waited_out(answers: tuple[object, ...]) -> None:
    """The others hang in a collective with it."""
    replica = Replica(*answers, floor_s=60)
    with pytest.raises(ReplicaFailed, match="a bug"):
        await replica.encode()
    assert replica.ended == 1


async def test_a_mistake_on_one_rank_is_waited_for_only_shortly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_group, "GRACE_S", 0.05)
    replica = Replica(MISTAKE, "hang", floor_s=60)
    with pytest.raises(ReplicaFailed, match="some ranks only: too small"):
        await replica.encode()
    assert replica.ended == 1


async def test_calls_teach_how_long_they_take() -> None:
    replica = Replica(None)
    await replica.group.run(1, ("encode",), (2**30,))
    assert replica.watchdog.seconds_for("encode", sizes=(2**30,)) == pytest.approx(0.2)


async def test_what_was_known_teaches_nothing() -> None:
    replica = Replica(Encoded((), is_cached=True))
    await replica.group.run(1, ("encode",), (2**30,))
    assert replica.group.longest_s("encode", (2**30,)) == math.inf


async def test_stages_of_one_call_share_the_time_that_it_took() -> None:
    replica = Replica("slow", floor_s=60)
    began = time.perf_counter()
    answers = await replica.group.run(1, ("encode", "prepare", "denoise"), SIZES)
    taken_s = time.perf_counter() - began
    assert 0.15 < sum(answer.seconds for answer in answers) <= taken_s
    assert answers[0].seconds == pytest.approx(answers[2].seconds)
    assert replica.group.longest_s("prepare", SIZES) == pytest.approx(answers[1].seconds)


async def test_a_call_is_named_by_its_stages() -> None:
    replica = Replica(BUG)
    with pytest.raises(ReplicaFailed, match=r"prepare\+denoise failed on a rank"):
        await replica.group.run(1, ("prepare", "denoise"), SIZES)


async def test_a_call_that_was_sent_ahead_has_its_time_from_the_end_of_the_former() -> None:
    replica = Replica("slow", "slow")
    answers = await asyncio.gather(*(replica.encode() for _ in range(4)))
    assert (answers, replica.ended) == (["slow"] * 4, 0)
    assert 0.2 < replica.watchdog.seconds_for("encode", sizes=SIZES) < 3, "what each took by itself"


async def test_a_death_is_seen_while_nothing_runs() -> None:
    replica = Replica(None, None)
    await asyncio.sleep(0)
    replica.ranks[1].die()
    for _ in range(5):
        await asyncio.sleep(0)
    assert replica.ended == 1


async def test_a_death_fails_the_call_that_would_hang() -> None:
    replica = Replica(None, "hang", floor_s=60)
    asyncio.get_running_loop().call_later(0.05, replica.ranks[1].die)
    with pytest.raises(ReplicaFailed, match="a rank died: of a cold"):
        await replica.encode()


@pytest.mark.parametrize("answer", ["hang", BUG], ids=["others hang", "others fail first"])
async def test_who_had_a_rank_killed_for_memory_hears_so_before_the_group_ends(
    monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    """Its second try may end another group. Who only waited is told of a death, as always."""
    monkeypatch.setattr(rank_group, "LAST_WORDS_S", 0.2)
    replica = Replica(answer, "hang", floor_s=60)
    killed = KilledForMemory("its node was out of memory")
    asyncio.get_running_loop().call_later(0.05, replica.ranks[1].die, killed)
    with pytest.raises(KilledForMemory, match="a rank died: its node was out of memory"):
        await replica.encode()
    assert replica.ended == 0, "what it said is still on its way"
    with pytest.raises(ReplicaFailed) as caught:
        await replica.encode()
    assert (type(caught.value), replica.ended) == (ReplicaFailed, 1)


@pytest.mark.parametrize(
    ("counted", "error"), [(7, ReplicaFailed), (8, KilledForMemory)], ids=["of a bug", "for memory"]
)
async def test_a_rank_that_the_kernel_kills_was_killed_for_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: int, error: type[ReplicaFailed]
) -> None:
    """Ray knows no cause of it, but the kernel has counted it. Older kills do not matter."""
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_dirty 5\noom_kill 7\n")
    monkeypatch.setattr(process, "VMSTAT", vmstat)
    replica = Replica(None, "hang", floor_s=60)
    vmstat.write_text(f"nr_dirty 6\noom_kill {counted}\n")
    asyncio.get_running_loop().call_later(0.05, replica.ranks[1].die)
    with pytest.raises(ReplicaFailed) as caught:
        await replica.encode()
    assert type(caught.value) is error


def test_a_kill_is_recent_for_as_many_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(process, "VMSTAT", vmstat)
    kills = process.KernelKills()
    assert not kills.is_one_recent(), "a system that does not count them"
    vmstat.write_text("oom_kill 1\n")
    for _ in range(process.NUM_LOOKS):
        assert kills.is_one_recent()
        kills.look()
    assert not kills.is_one_recent()


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_rank_that_hangs_ends_the_group_whatever_it_was_called_for(
    monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    """Of a stage that was never seen nobody knows how long it may take."""
    for module in (rank_group, liveness):
        monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(liveness, "ASK_S", 0.02)
    monkeypatch.setattr(rank_group, "HUNG_S", 0.3)
    replica = Replica(None, "hang" if is_busy else None, floor_s=60)
    calls = [asyncio.ensure_future(replica.encode())] if is_busy else []
    await asyncio.sleep(0.6)
    assert replica.ended == 0, "it is at work, and answers pings"
    replica.ranks[1].stop()
    async with asyncio.timeout(60):
        await replica.has_ended.wait()
    for call in calls:
        with pytest.raises(ReplicaFailed, match="rank 1 hangs"):
            await call
    assert replica.ended == 1
