"""A request goes to the replica that was granted, and that one is not asked to accept it first."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from flux_ray.router import handover
from flux_ray.router.replica_choice import AssignedReplicaRouter, UnaskedReplica, granted_for
from flux_ray.wire import pack_call


class FakeActor:
    """Of a replica: takes plain calls only, and keeps them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.handle_request = SimpleNamespace(remote=lambda *args: self.calls.append(args))


def replica_of(name: str, actor: FakeActor | None = None) -> UnaskedReplica:
    return UnaskedReplica(
        SimpleNamespace(
            multiplexed_model_ids=[],
            is_cross_language=False,
            replica_id=SimpleNamespace(unique_id=name),
            get_actor_handle=lambda: actor,
        )
    )


def pending(call: dict[str, Any]) -> PendingRequest:
    return PendingRequest([call], {}, RequestMetadata("r1", "i1", call_method="generate"))


@pytest.fixture
def router() -> AssignedReplicaRouter:
    """Of which only the choice is needed."""
    return object.__new__(AssignedReplicaRouter)


async def test_a_call_is_one_message_there_and_one_back():
    actor, call = FakeActor(), pack_call("tiny", "r1")
    result = replica_of("a", actor).try_send_request(pending(call), with_rejection=True)
    assert (await result.get_rejection_response()).accepted
    [(metadata, sent)] = actor.calls
    assert pickle.loads(metadata).call_method == "generate" and sent == call


def test_the_replicas_that_serve_names_are_such():
    made = object.__new__(AssignedReplicaRouter).create_replica_wrapper(
        replica_of("a")._replica_info
    )
    assert isinstance(made, UnaskedReplica) and made.replica_id.unique_id == "a"


async def test_the_granted_one_comes_first(router, monkeypatch):
    call = pack_call("tiny", "r1")
    monkeypatch.setitem(handover.GRANTED, ("tiny", "r1"), "b")
    ranked = await router.choose_replicas([replica_of(each) for each in "abc"], pending(call))
    assert [replica.replica_id.unique_id for [replica] in ranked] == ["b", "a", "c"]


async def test_a_call_of_another_kind_was_granted_nothing():
    assert granted_for(None) is None
    assert granted_for(PendingRequest(["a text"], {}, RequestMetadata("r", "i"))) is None
