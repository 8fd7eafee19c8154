"""Serve's request router of a tier: a request goes to the replica that the ledger granted it.

Serve makes one in every process that has a handle. It is the code of the tier, also in gateways of
another version: what it reads of calls and of `handover` never changes.
"""

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

# The module, not what is in it: Serve pickles this class with copies of its globals.
from flux_ray.router import handover


class GrantedReplica(FIFOMixin, RequestRouter):
    """Any other replica only where the granted one is gone."""

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
