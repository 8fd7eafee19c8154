"""Serve's request router of a tier: a request goes to the replica that the ledger granted it.

Serve makes one in every process that has a handle. It is the code of the tier, also in gateways of
another version: what it reads of calls and of `handover` never changes.
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

# The module, not what is in it: Serve pickles this class with copies of its globals.
from flux_ray.router import handover


class AlwaysAccepted(ActorReplicaResult):
    """The answer to a call that its replica was not asked to accept."""

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        """Say what the replica would."""
        return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)


class UnaskedReplica(RunningReplica):
    """A replica that is called at once.

    Serve would have it accept each call first, in a stream of its own that costs both processes as
    much as all the rest of the call. The ledger knows what it has room for, and one that is about
    to end does what it was sent before it does.
    """

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ActorReplicaResult:
        """Send it; it is accepted."""
        actor = self._actor_handle
        method = actor.handle_request
        if pr.metadata.is_streaming:
            method = actor.handle_request_streaming.options(num_returns="streaming")
        return AlwaysAccepted(
            method.remote(pickle.dumps(pr.metadata), *pr.args, **pr.kwargs), pr.metadata
        )


class AssignedReplicaRouter(FIFOMixin, RequestRouter):
    """Any other replica only where the granted one is gone."""

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """Serve tells of a replica that it did not know."""
        return UnaskedReplica(replica_info)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells of a change."""
        super().update_replicas(replicas)
        self._note()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found it dead, before Serve's controller did."""
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
        """One replica a rank: inside of a rank Serve would go by the number of requests."""
        granted = granted_for(pending_request)
        ranked = sorted(
            candidate_replicas, key=lambda replica: replica.replica_id.unique_id != granted
        )
        return [[replica] for replica in ranked]


def granted_for(pending_request: PendingRequest | None) -> str | None:
    """The replica that the request was granted; None for one of another caller."""
    args: Any = () if pending_request is None else pending_request.args
    if not args or not isinstance(args[0], dict):
        return None
    call: dict[str, Any] = args[0]
    return handover.GRANTED.get((call.get("tier", ""), call.get("request_id", "")))
