"""Which of Serve's replicas are asked for signs of life, what counts as one, and who is killed."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from flux_ray import liveness
from flux_ray.router import handover
from flux_ray.router.ledger import hung_processes as hung
from flux_ray.router.ledger.hung_processes import AskedReplica, HungProcesses, our_replicas

GATEWAY = "SERVE_REPLICA::gateway#gateway#aaaa"
LEADER = "SERVE_REPLICA::tiny#tiny#bbbb"
ENCODER = "SERVE_REPLICA::flux-2-dev#flux-2-dev-text-encoder#cccc"
OTHERS = (
    "SERVE_CONTROLLER_ACTOR",
    "SERVE_PROXY_ACTOR-f00",
    "SERVE_REPLICA::alone#dddd",
    "SERVE_REPLICA::chat#llm#eeee",
    "flux-ray-ledger-1",
)


def test_ours_are_gateways_and_all_of_a_tiers_application() -> None:
    ours = our_replicas((GATEWAY, LEADER, ENCODER, *OTHERS))
    assert ours.keys() == {GATEWAY, LEADER, ENCODER}
    assert tuple(ours[ENCODER]) == ("flux-2-dev", "flux-2-dev-text-encoder", "cccc")


class Method:
    """Of a fake actor."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class FakeReplica:
    """Answers as Serve's replicas do; `stop` stops it as SIGSTOP does."""

    def __init__(self, *, has_begun: bool = True) -> None:
        self.has_begun = has_begun
        self.num_checked = self.num_asked = 0
        self.errors: list[Exception] = []
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self.was_initialized = Method(self._was_initialized)
        self.check_alive = Method(self._check_alive)
        self.check_health = Method(self._check_health)

    def stop(self) -> None:
        self._goes_on.clear()

    async def _was_initialized(self) -> bool:
        await self._goes_on.wait()
        self.num_asked += 1
        return self.has_begun

    async def _check_alive(self) -> None:
        await self._goes_on.wait()
        self.num_checked += 1

    async def _check_health(self) -> None:
        await self._goes_on.wait()
        assert self.has_begun, "Serve logs a failed check of one that is not there yet"
        self.num_checked += 1
        if self.errors:
            raise self.errors.pop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seconds pass five hundred times as fast."""
    for module in (liveness, hung):
        monkeypatch.setattr(module, "ASK_S", 0.004)
        monkeypatch.setattr(module, "LOOK_S", 0.002)
    monkeypatch.setattr(hung, "HUNG_S", 0.2)
    monkeypatch.setattr(hung, "LOADING_HUNG_S", 1.0)
    monkeypatch.setattr(hung, "CONTROLLER_HUNG_S", 0.2)


async def test_one_that_says_that_it_is_unwell_lives() -> None:
    replica = FakeReplica()
    replica.errors = [RayTaskError("check_health", "a traceback", RuntimeError("a rank died"))]
    async with asyncio.timeout(10):
        await AskedReplica(replica).give_sign()


async def test_a_broken_way_is_no_sign_and_death_is_the_end() -> None:
    replica = FakeReplica()
    replica.errors = [ActorUnavailableError("the network", b"\0" * 16)]
    async with asyncio.timeout(10):
        await AskedReplica(replica).give_sign()
    assert replica.num_checked == 2
    replica.errors = [ActorDiedError()]
    with pytest.raises(ActorDiedError):
        await AskedReplica(replica).give_sign()


class Cluster:
    """The named actors of a Ray; those that are killed are gone."""

    def __init__(self, actors: dict[str, FakeReplica]) -> None:
        self.actors = actors
        self.killed: list[str] = []
        self.restarting: list[str] = []

    def list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        return [{"name": name, "namespace": "serve"} for name in (*self.actors, *OTHERS)]

    def get_actor(self, name: str, namespace: str) -> FakeReplica:
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def kill(self, actor: FakeReplica, no_restart: bool = True) -> None:
        (name,) = (name for name, each in self.actors.items() if each is actor)
        self.killed.append(name)
        if not no_restart:
            self.restarting.append(name)
        del self.actors[name]


class FakeCounter:
    """Counts nothing."""

    def inc(self, value: int, labels: dict[str, str]) -> None:
        """Nor does it complain."""


# When a process began, in ticks.
BEGAN = 77


class Looks:
    """Looks at processes; of each it says that it is busy, unless it is among `still`."""

    def __init__(self) -> None:
        self.still: set[FakeReplica] = set()
        self.ages_s: dict[FakeReplica, float] = {}
        self.num_looks = 0
        self.seconds = 0.0
        self.cluster: Cluster
        self.ended: list[str] = []
        self.errors: list[Exception] = []

    async def find_process(self, actor: FakeReplica, thread: object) -> "FakeProcess":
        return FakeProcess(self, actor)


@dataclass(frozen=True)
class FakeProcess:
    """The process of a fake replica."""

    looks: Looks
    actor: FakeReplica

    async def beside(self, remote: Any, *args: Any, thread: object) -> int | None:
        looks, actor = self.looks, self.actor
        if remote is hung.LOOK:
            looks.num_looks += 1
            await asyncio.sleep(looks.seconds)
            _, from_age_s = args
            is_old = looks.ages_s.get(actor, 1000.0) >= from_age_s
            return BEGAN if actor in looks.still and is_old else None
        assert (remote, args) == (hung.END, (BEGAN,))
        if looks.errors:
            raise looks.errors.pop()
        looks.cluster.kill(actor)
        looks.ended.append(looks.cluster.killed[-1])
        return None


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks = Looks()
    monkeypatch.setattr(hung, "find_process", looks.find_process)
    monkeypatch.setattr(hung, "SUSPECT_S", 0.05)
    return looks


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch, looks: Looks) -> Cluster:
    cluster = Cluster({GATEWAY: FakeReplica(), LEADER: FakeReplica(), ENCODER: FakeReplica()})
    monkeypatch.setattr(hung.ray.util, "list_named_actors", cluster.list_named_actors)
    monkeypatch.setattr(hung.ray, "get_actor", cluster.get_actor)
    monkeypatch.setattr(hung.ray, "kill", cluster.kill)
    monkeypatch.setattr(hung, "counter", lambda metric: FakeCounter())
    looks.cluster = cluster
    return cluster


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_each_that_hangs_is_killed_and_no_other(
    cluster: Cluster, serve_log: pytest.LogCaptureFixture
) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    await until(lambda: all(each.num_checked > 2 for each in cluster.actors.values()))
    for number, name in enumerate((LEADER, ENCODER, GATEWAY), 1):
        cluster.actors[name].stop()
        await until(lambda number=number: len(cluster.killed) == number)
    assert cluster.killed == [LEADER, ENCODER, GATEWAY]
    assert f"{LEADER} hangs" in serve_log.text
    assert cluster.restarting == [], "Serve makes new ones, under other names"
    watching.cancel()


async def test_a_controller_that_hangs_is_killed_and_started_again(cluster: Cluster) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    controller = cluster.actors[hung.CONTROLLER] = FakeReplica()
    await until(lambda: controller.num_checked > 2)
    controller.stop()
    await until(lambda: cluster.restarting == [hung.CONTROLLER])
    assert cluster.killed == [hung.CONTROLLER]
    again = cluster.actors[hung.CONTROLLER] = FakeReplica()
    await until(lambda: again.num_checked > 2)
    watching.cancel()


async def test_a_controller_that_hung_before_the_watch_began_is_killed_too(
    cluster: Cluster,
) -> None:
    controller = cluster.actors[hung.CONTROLLER] = FakeReplica()
    controller.stop()
    watching = asyncio.create_task(HungProcesses().run())
    await until(lambda: cluster.restarting == [hung.CONTROLLER])
    watching.cancel()


async def test_one_that_hangs_while_it_loads_is_killed_in_the_end(cluster: Cluster) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    new = "SERVE_REPLICA::tiny#tiny#ffff"
    replica = cluster.actors[new] = FakeReplica(has_begun=False)
    await until(lambda: replica.num_asked > 2)
    replica.stop()
    await asyncio.sleep(0.6)
    assert cluster.killed == [], "not within the time of one that serves"
    await until(lambda: cluster.killed == [new])
    watching.cancel()


async def test_one_that_comes_later_is_watched_too_but_not_before_it_has_begun(
    cluster: Cluster,
) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    new = "SERVE_REPLICA::tiny#tiny#ffff"
    replica = cluster.actors[new] = FakeReplica(has_begun=False)
    replica.stop()
    await asyncio.sleep(0.6)
    assert cluster.killed == []
    replica.has_begun = True
    replica._goes_on.set()
    await until(lambda: replica.num_checked > 2)
    replica.stop()
    await until(lambda: cluster.killed == [new])
    watching.cancel()


async def test_one_that_hung_before_the_watch_began_is_known_by_serves_word(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for replica in cluster.actors.values():
        replica.stop()
    watching = asyncio.create_task(HungProcesses().run())
    await asyncio.sleep(0.1)
    monkeypatch.setitem(handover.REACHABLE, "tiny", ("bbbb",))
    await until(lambda: cluster.killed)
    await asyncio.sleep(0.5)
    assert cluster.killed == [LEADER], "of the others nobody says that they are up"
    watching.cancel()


async def test_while_rays_head_is_away_nobody_is_missed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    await until(lambda: all(each.num_checked > 2 for each in cluster.actors.values()))

    def no_answer(all_namespaces: bool) -> Any:
        raise hung.RayError("no head")

    with monkeypatch.context() as away:
        away.setattr(hung.ray.util, "list_named_actors", no_answer)
        cluster.actors[LEADER].stop()
        await asyncio.sleep(0.6)
        assert cluster.killed == []
    await until(lambda: cluster.killed == [LEADER])
    watching.cancel()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is ended for silence alone."""
    for limit in ("HUNG_S", "LOADING_HUNG_S", "CONTROLLER_HUNG_S"):
        monkeypatch.setattr(hung, limit, 1000.0)


@pytest.mark.usefixtures("patient")
async def test_one_that_stands_still_is_killed_before_its_time(
    cluster: Cluster, looks: Looks
) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    controller = cluster.actors[hung.CONTROLLER] = FakeReplica()
    await until(lambda: all(each.num_checked > 2 for each in cluster.actors.values()))
    leader = cluster.actors[LEADER]
    looks.still = {controller, leader}
    assert looks.num_looks == 0, "who answers is not looked at"
    for each in cluster.actors.values():
        each.stop()
    await until(lambda: len(cluster.killed) == 2)
    seen = looks.num_looks
    await until(lambda: looks.num_looks > seen + 4)
    assert set(cluster.killed) == {hung.CONTROLLER, LEADER}, "the others are busy"
    assert set(looks.ended) == set(cluster.killed), "on their nodes, without Ray's wait"
    watching.cancel()


async def test_a_watch_that_begins_again_leaves_nobody_who_asks(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(all_namespaces: bool) -> Any:
        raise KeyError("name")

    watching = asyncio.create_task(HungProcesses().run())
    await until(lambda: all(each.num_checked > 2 for each in cluster.actors.values()))
    monkeypatch.setattr(hung.ray.util, "list_named_actors", unforeseen)
    with pytest.raises(KeyError):
        await watching
    asked = [each.num_checked for each in cluster.actors.values()]
    await asyncio.sleep(0.1)
    assert [each.num_checked for each in cluster.actors.values()] == asked


@pytest.mark.usefixtures("patient")
async def test_one_whose_node_cannot_end_it_is_ended_by_ray(cluster: Cluster, looks: Looks) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    leader = cluster.actors[LEADER]
    await until(lambda: leader.num_checked > 2)
    looks.errors, looks.still = [hung.RayError("no worker can start")], {leader}
    leader.stop()
    await until(lambda: cluster.killed == [LEADER])
    assert looks.ended == []
    watching.cancel()


@pytest.mark.usefixtures("patient")
async def test_of_what_hung_before_the_watch_began_an_old_gateway_is_looked_at_at_once(
    cluster: Cluster, looks: Looks
) -> None:
    """A ledger that hung with it is replaced: the next one does not wait once more."""
    new = "SERVE_REPLICA::gateway#gateway#gggg"
    cluster.actors[new] = FakeReplica(has_begun=False)
    looks.still = set(cluster.actors.values())
    looks.ages_s = {cluster.actors[new]: hung.GATEWAY_LOADED_S - 1}
    for replica in cluster.actors.values():
        replica.stop()
    watching = asyncio.create_task(HungProcesses().run())
    await until(lambda: looks.ended == [GATEWAY])
    seen = looks.num_looks
    await until(lambda: looks.num_looks > seen + 2)
    assert looks.ended == [GATEWAY], "the new one may be loading, and tiers have no such age"
    watching.cancel()


@pytest.mark.usefixtures("patient")
async def test_one_that_answers_while_it_is_looked_at_lives(cluster: Cluster, looks: Looks) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    leader = cluster.actors[LEADER]
    await until(lambda: leader.num_checked > 2)
    looks.seconds, looks.still = 0.3, {leader}
    leader.stop()
    await until(lambda: looks.num_looks == 1)
    leader._goes_on.set()
    await asyncio.sleep(0.6)
    assert cluster.killed == []
    watching.cancel()


@pytest.mark.usefixtures("patient")
async def test_one_that_loads_may_wait_for_its_disk(cluster: Cluster, looks: Looks) -> None:
    watching = asyncio.create_task(HungProcesses().run())
    new = "SERVE_REPLICA::tiny#tiny#ffff"
    replica = cluster.actors[new] = FakeReplica(has_begun=False)
    await until(lambda: replica.num_asked > 2)
    looks.still = {replica}
    replica.stop()
    await asyncio.sleep(0.4)
    assert (looks.num_looks, cluster.killed) == (0, [])
    watching.cancel()
