"""What the queue trades in: a ticket to be served, the grant of a replica, and a refusal."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request as the queue sees it.

    `cost_s` is its price: GPU seconds on one replica of the tier, which is also its unloaded
    latency. `deadline` is a time on the caller's clock. Work of one `key` is paid from one purse,
    `weight` times as large as that of a key of weight 1. `affinity` names cached things (hashes of
    the prompt, of references) with the seconds that a replica holding them saves.
    `has_deadline`: its caller said one; else it waits in order of arrival, and until then at most.
    `is_job`: nobody waits for it, and it waits behind those for whom somebody does.
    """

    ticket_id: str
    tier: str
    cost_s: float
    deadline: float
    key: str = ""
    weight: float = 1.0
    affinity: tuple[tuple[str, float], ...] = ()
    has_deadline: bool = True
    is_job: bool = False


class Rejection(NamedTuple):
    """Why not, and after how many seconds the same request would be taken if nobody else came.

    `retry_after_s` is infinite where no waiting helps: the deadline is shorter than the work.
    """

    reason: str
    retry_after_s: float


class Assignment(NamedTuple):
    """The ticket's turn has come, on this replica."""

    ticket: QueuedRequest
    replica: str


class RejectedEntry(NamedTuple):
    """A ticket that had been waiting, and waits no more."""

    ticket: QueuedRequest
    refusal: Rejection
