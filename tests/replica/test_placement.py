"""What a replica asks of the cluster, and which rank gets which part of it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, OutOfMemoryError

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import KilledForMemory
from flux_ray.replica import rank_group
from flux_ray.replica.leader import Leader
from flux_ray.replica.rank_group import (
    LoadedRank,
    ranks_by_node,
    resources_for,
    start_beside_leader,
)

# Its 48 heads can be split over six ranks.
DEV = "flux-2-dev"


def test_on_several_nodes_a_rank_has_a_bundle() -> None:
    args = TierArgs(
        tier=DEV, weights="a/b@c", num_cpus=2, parallel=Parallel(tensor=2, sequence=3, num_nodes=2)
    )
    options = resources_for(args)
    assert options["placement_group_bundles"] == [{"CPU": 2.0, "GPU": 1.0}] * 6
    assert options["placement_group_strategy"] == "PACK"
    assert options["ray_actor_options"] == {"num_cpus": 0}


def test_on_one_node_the_leader_takes_what_its_ranks_need() -> None:
    args = TierArgs(tier=DEV, weights="a/b@c", num_cpus=2, parallel=Parallel(tensor=2, sequence=3))
    options = {"num_cpus": 12, "num_gpus": 6, "label_selector": {}}
    assert resources_for(args) == {"ray_actor_options": options}


def test_a_laptop_needs_no_gpu() -> None:
    args = TierArgs(tier="tiny", device="cpu", num_cpus=0.5)
    options = resources_for(args)["ray_actor_options"]
    assert (options["num_cpus"], options["num_gpus"]) == (0.5, 0)


def test_replicas_are_where_the_labels_say() -> None:
    for parallel in (Parallel(), Parallel(tensor=2, num_nodes=2)):
        args = TierArgs(tier="tiny", parallel=parallel, node_labels={"pool": "!whole"})
        options = serve.deployment(**resources_for(args))(Leader)._replica_config
        if parallel.num_nodes == 1:
            assert options.ray_actor_options["label_selector"] == {"pool": "!whole"}
        else:
            assert options.placement_group_bundle_label_selector == [{"pool": "!whole"}] * 2


class FakeRank:
    """A rank's actor class, which notes how its actors are started."""

    def __init__(self) -> None:
        self.started: list[tuple[dict[str, Any], tuple[Any, ...]]] = []

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=lambda *given: self.started.append((options, given)))


def test_each_rank_gets_one_of_the_leaders_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "ab" * 28)
    monkeypatch.setattr(rank_group.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(rank_group.ray, "get_gpu_ids", lambda: ["10", "2"])
    args, fake = TierArgs(tier="tiny", parallel=Parallel(tensor=2)), FakeRank()
    start_beside_leader(fake, args)
    assert [given for _, given in fake.started] == [(0, args, "2"), (1, args, "10")]
    for options, _ in fake.started:
        assert (options["num_cpus"], options["num_gpus"]) == (0, 0), "the leader has taken them"
        assert options["scheduling_strategy"].node_id == "ab" * 28
    monkeypatch.setattr(rank_group.ray, "get_gpu_ids", lambda: [5])
    with pytest.raises(ValueError, match="shorter"):
        start_beside_leader(fake, args)


def test_bundles_of_one_node_keep_their_order() -> None:
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
    watching = asyncio.ensure_future(LoadedRank(actor, line, work, pid=1).live())
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
    watching = asyncio.ensure_future(LoadedRank(actor, line, work, pid=1).live())
    closed.set_result(None)
    loop.call_later(0.02, work.set_exception, error)
    async with asyncio.timeout(5):
        assert type(await watching) is expected
