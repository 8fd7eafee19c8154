"""The values that go into a queue and come out: a request, its assignment or its rejection."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request as the queue sees it.

    `cost_s` is its price in replica seconds, which is also its latency on an idle replica.
    `deadline` is a time on the clock of whoever calls the queue. All requests of one `key` count
    towards that key's share, which is proportional to `weight`. `affinity` names what a replica
    may have cached (hashes of the prompt and of the references), with the seconds that this saves.
    If `has_deadline` is false, the caller named none: the request waits in order of arrival, and
    at most until `deadline`. `is_job`: no client waits for it, so it waits behind those of clients.
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
    """Why a request was refused, and when to send it again.

    After `retry_after_s` the same request would be admitted if nothing else arrived. It is infinite
    if waiting does not help, because the deadline is shorter than the work.
    """

    reason: str
    retry_after_s: float


class Assignment(NamedTuple):
    """A request whose turn has come, and the replica that it is for."""

    request: QueuedRequest
    replica: str


class RejectedEntry(NamedTuple):
    """A request that was admitted, waited, and is refused after all."""

    request: QueuedRequest
    rejection: Rejection
