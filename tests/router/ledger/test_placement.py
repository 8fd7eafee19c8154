"""The ledger's node: one with processors, and not one that is about to be taken away."""

import asyncio

import pytest
from ray.exceptions import RayError

from flux_ray.router.ledger import placement
from flux_ray.router.ledger.placement import leave_drained_node, node_for_ledger


def node(name: str, cpus: float | None, *, is_alive: bool = True) -> dict[str, object]:
    resources = {"memory": 1e9} if cpus is None else {"CPU": cpus}
    return {"NodeID": name, "Alive": is_alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("own", 4.0), node("another", 4.0)], "own"),
        ([node("own", None), node("worker 2", 8.0), node("worker 1", 4.0)], "worker 1"),
        ([node("own", 0.0), node("dead", 8.0, is_alive=False), node("alive", 1.0)], "alive"),
        ([node("own", None)], "own"),
        ([], "own"),
    ],
)
def test_the_ledger_is_beside_processors_where_there_are_any(
    nodes: list[dict[str, object]], expected: str
) -> None:
    """A head that has none to give is left alone, also by the controller, which runs there."""
    assert node_for_ledger(nodes, "own") == expected


@pytest.mark.parametrize(
    ("draining", "expected"),
    [
        ({"own"}, "a"),
        ({"own", "a"}, "b"),
        ({"a"}, "own"),
        ({"own", "a", "b"}, "own"),
        # The head has no processors: it is not taken, whatever becomes of the others.
        ({"own", "a", "b", "head"}, "own"),
    ],
)
def test_a_node_that_drains_is_the_last_choice(draining: set[str], expected: str) -> None:
    nodes = [node("own", 4.0), node("b", 4.0), node("a", 4.0), node("head", 0.0)]
    assert node_for_ledger(nodes, "own", draining) == expected


async def test_it_leaves_once_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and also when Ray's head was away meanwhile."""
    monkeypatch.setattr(placement, "ASK_EVERY_S", 0.001)
    answers: list[bool | RayError] = [False, RayError("the head is away"), False, True, True]
    ended: list[int] = []

    def has_to() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, RayError):
            raise answer
        return answer

    await asyncio.wait_for(leave_drained_node(has_to, lambda: ended.append(len(answers))), 5)
    assert ended == [1]
