"""What a replica asks of the cluster, and which rank gets which bundle of it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import KilledForMemory
from flux_ray.replica.rank_group import LoadedRank, bundles_for, ranks_by_node, strategy_for


def test_one_bundle_a_rank() -> None:
    args = TierArgs(tier="tiny", num_cpus=2, parallel=Parallel(tensor=2, sequence=3))
    assert bundles_for(args) == [{"CPU": 2.0, "GPU": 1.0}] * 6


def test_a_laptop_needs_no_gpu() -> None:
    assert bundles_for(TierArgs(tier="tiny", device="cpu", num_cpus=0.5)) == [{"CPU": 0.5}]


def test_a_group_shares_a_node_unless_it_may_spread() -> None:
    assert strategy_for(Parallel(tensor=8)) == "STRICT_PACK"
    assert strategy_for(Parallel(tensor=8, sequence=2, num_nodes=2)) == "PACK"


def test_on_one_node_ranks_are_bundles() -> None:
    assert ranks_by_node({2: "a", 0: "a", 1: "a"}, num_nodes=1) == [0, 1, 2]


def test_ranks_of_a_node_are_neighbours_and_the_leaders_node_is_first() -> None:
    nodes = {0: "b", 1: "a", 2: "b", 3: "a", 4: "b", 5: "a"}
    assert ranks_by_node(nodes, num_nodes=2) == [0, 2, 4, 1, 3, 5]


def test_more_nodes_than_allowed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 nodes, parallel\.num_nodes is 2"):
        ranks_by_node({0: "a", 1: "b", 2: "c"}, num_nodes=2)


@pytest.mark.parametrize("what", ["its line is closed", "its line fails", "Ray finds it dead"])
async def test_a_rank_is_dead_when_either_says_so(what: str) -> None:
    """A process closes its line sooner than Ray hears of it; a node that is gone closes none."""
    loop = asyncio.get_running_loop()
    closed, work = loop.create_future(), loop.create_future()
    line: Any = SimpleNamespace(closed=closed)
    actor: Any = None
    watching = asyncio.ensure_future(LoadedRank(actor, line, work).live())
    await asyncio.sleep(0)
    assert not watching.done()
    error = None if what == "its line is closed" else RuntimeError(what)
    if error is None:
        closed.set_result(None)
    else:
        (work if what == "Ray finds it dead" else closed).set_exception(error)
    async with asyncio.timeout(5):
        assert await watching is error


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OutOfMemoryError("95% of the node's"), KilledForMemory), (ActorDiedError(), ActorDiedError)],
)
async def test_what_a_rank_died_of_is_heard_of_ray_a_moment_after_its_line_closes(
    error: Exception, expected: type[Exception]
) -> None:
    loop = asyncio.get_running_loop()
    closed, work = loop.create_future(), loop.create_future()
    line: Any = SimpleNamespace(closed=closed)
    actor: Any = None
    watching = asyncio.ensure_future(LoadedRank(actor, line, work).live())
    closed.set_result(None)
    loop.call_later(0.02, work.set_exception, error)
    async with asyncio.timeout(5):
        assert type(await watching) is expected
