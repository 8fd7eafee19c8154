"""Serve's request router for a tier: it sends a request to the replica that the ledger assigned.

Serve makes one in every process that has a handle. It runs the code of the tier's version, even in
gateways of another version, so what it reads from calls and from `handover` must never change.
"""

import pickle
from typing import Any

from ray.serve._private.common import ReplicaQueueLengthInfo, RunningReplicaInfo
from ray.serve._private.replica_result import ActorReplicaResult
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

# The module, not its names: Serve pickles this class by value, with copies of its globals, and a
# copy of GRANTED would stay empty.
from flux_ray.router import handover


class AlwaysAccepted(ActorReplicaResult):
    """The answer to a call that its replica was not asked to accept first."""

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        """Return what a replica that accepts the call would answer."""
        return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)


class UnaskedReplica(RunningReplica):
    """A replica that is called at once, without asking whether it accepts the call.

    Serve would ask first, in a stream that costs both processes as much as all the rest of the
    call. That is not needed: the ledger knows whether the replica has room, and a replica that is
    about to end finishes what it was sent.
    """

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ActorReplicaResult:
        """Send the call, and return an answer that counts as accepted."""
        actor = self._actor_handle
        method = actor.handle_request
        if pr.metadata.is_streaming:
            method = actor.handle_request_streaming.options(num_returns="streaming")
        return AlwaysAccepted(
            method.remote(pickle.dumps(pr.metadata), *pr.args, **pr.kwargs), pr.metadata
        )


class AssignedReplicaRouter(FIFOMixin, RequestRouter):
    """A request router that takes another replica only if the assigned one is gone."""

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """Wrap a replica that Serve has discovered."""
        return UnaskedReplica(replica_info)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in the replicas that Serve knows, and note them as reachable."""
        super().update_replicas(replicas)
        self._note()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Drop a replica that a call found dead, before Serve's controller tells of it."""
        super().on_replica_actor_died(replica_id)
        self._note()

    def _note(self) -> None:
        names = sorted(replica_id.unique_id for replica_id in self.curr_replicas)
        handover.REACHABLE[self.app_name] = tuple(names)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in order of preference, the assigned replica first.

        Each is a list of its own: within one list Serve would choose by the number of requests.
        """
        granted = granted_for(pending_request)
        ranked = sorted(
            candidate_replicas, key=lambda replica: replica.replica_id.unique_id != granted
        )
        return [[replica] for replica in ranked]


def granted_for(pending_request: PendingRequest | None) -> str | None:
    """Return the replica that the ledger assigned; None for a call that no router of ours made."""
    args: Any = () if pending_request is None else pending_request.args
    if not args or not isinstance(args[0], dict):
        return None
    call: dict[str, Any] = args[0]
    return handover.GRANTED.get((call.get("tier", ""), call.get("request_id", "")))
