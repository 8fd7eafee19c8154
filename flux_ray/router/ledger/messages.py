"""What gateways and the ledger tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flux_ray.request import QueuePosition
from flux_ray.router.ledger.retries import Retry
from flux_ray.router.queue.entry import Rejection


@dataclass(frozen=True)
class SubmitRequest:
    """A request as its gateway tells of it: clocks differ, so its deadline is so far from now.

    `runs_on` is the replica that it was granted before, and `cost_s` then what is left: the ledger
    may have been lost meanwhile. `work` names what is to be done, the same however often it is
    asked for; `is_counted`: a ledger has heard of it. `has_deadline` and `is_job` are as a
    ticket's. `retry`: by what it is known when it comes again, and is then drawn from `seed`.
    """

    ticket_id: str
    tier: str
    cost_s: float
    deadline_in_s: float
    key: str = ""
    weight: float = 1.0
    affinity: tuple[tuple[str, float], ...] = ()
    runs_on: str | None = None
    has_deadline: bool = True
    is_job: bool = False
    work: str = ""
    is_counted: bool = False
    retry: Retry | None = None
    seed: int = 0


@dataclass(frozen=True)
class GatewayReport:
    """What a gateway says: what came, what ended, and which replicas it can reach, by tier.

    `known`, now and then: all that it waits for or runs; `waiting` are those of them that wait.
    `done`: which of the ended had what they wanted. `left_s`: what running ones still take.
    `watched`: whose positions it wants to hear. `cold_starts`: what a replica takes to start, by
    tier. Statements of one gateway have rising numbers; 0 is none.
    """

    offers: tuple[SubmitRequest, ...] = ()
    ended: tuple[str, ...] = ()
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: frozenset[str] | None = None
    done: tuple[str, ...] = ()
    left_s: tuple[tuple[str, float], ...] = ()
    waiting: frozenset[str] = frozenset()
    watched: tuple[str, ...] = ()
    cold_starts: Mapping[str, float] = field(default_factory=dict)
    number: int = 0


class Decision(NamedTuple):
    """A ticket's turn on a replica, or why it gets none."""

    ticket_id: str
    replica: str | None
    refusal: Rejection | None = None


class ReportReply(NamedTuple):
    """What a gateway is told at once: the known tickets that the ledger lacks, and its decisions.

    It is told of these again, in case that this never arrives. `positions`: of the watched tickets
    that wait.
    """

    unknown: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    positions: tuple[tuple[str, QueuePosition], ...] = ()


class Backlog(NamedTuple):
    """GPU seconds of a tier: waiting, left of what runs, and arrived since the ledger began."""

    waiting_s: float = 0.0
    running_s: float = 0.0
    arrived_s: float = 0.0
