"""The work of the reality bench: a mix of requests, their times, and what became of them."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, QueuePolicy, ReplicaPool
from flux_ray.simulator.traffic import poisson
from tests.bench.opponents.counted import CountedQueue
from tests.bench.opponents.routers import (
    EarlyBinding,
    Fifo,
    least_requests,
    power_of_two,
    round_robin,
)

TIER = "tiny"
PROMPT = "a red circle on a blue background"
OURS = "ours"
SERVE_DEFAULT = "power_of_two"
# The time that a gateway gives a request without a deadline.
NO_LIMIT_S = 600.0


@dataclass(frozen=True)
class Shape:
    """A kind of request: side in pixels, steps and images; `weight` in a hundred are of it."""

    side: int
    steps: int
    images: int
    weight: int

    @property
    def fields(self) -> dict[str, object]:
        """Return the fields of a request's body."""
        size = f"{self.side}x{self.side}"
        return {"model": TIER, "size": size, "steps": self.steps, "n": self.images}


SHAPES = (Shape(128, 20, 1, 70), Shape(192, 20, 1, 20), Shape(192, 20, 4, 10))


@dataclass(frozen=True)
class Measured:
    """The seconds of a shape's requests without any waiting: of their stages, and in all.

    `between_s`: how long our replica is idle until the next request is assigned to it.
    """

    service_s: tuple[float, ...]
    latency_s: tuple[float, ...]
    between_s: float

    @property
    def unloaded_s(self) -> float:
        """Return the median latency without waiting."""
        return median(self.latency_s)

    @property
    def cost_s(self) -> float:
        """Return the median seconds of work in the replica."""
        return median(self.service_s)


Costs = Mapping[Shape, Measured]


@dataclass(frozen=True)
class Sent:
    """One request of a trace; `deadline_s` is None if the client sends none."""

    at_s: float
    shape: Shape
    deadline_s: float | None


@dataclass(frozen=True)
class Played:
    """What became of a trace: the latency of every request, or None for one that was refused.

    `services_s`: the seconds that each really took in its replica, if they were measured.
    """

    trace: tuple[Sent, ...]
    latencies_s: tuple[float | None, ...]
    services_s: tuple[float | None, ...] = ()

    @property
    def num_refused(self) -> int:
        """Return the number of requests that never got an image."""
        return self.latencies_s.count(None)

    def quantile(self, share: float) -> float:
        """Return a quantile of the latencies of all requests that were served."""
        served = sorted(latency for latency in self.latencies_s if latency is not None)
        return served[min(int(share * len(served)), len(served) - 1)] if served else math.nan

    @property
    def met(self) -> list[bool]:
        """Return for each request whether it met its deadline."""
        return [
            latency_s is not None and latency_s <= (sent.deadline_s or math.inf)
            for sent, latency_s in zip(self.trace, self.latencies_s, strict=True)
        ]

    def attainment(self, costs: Costs | None = None) -> float:
        """Return the share that met its deadline, weighted by the seconds of `costs` if given."""
        weights = [1.0 if costs is None else costs[sent.shape].cost_s for sent in self.trace]
        met = sum(weight for weight, is_met in zip(weights, self.met, strict=True) if is_met)
        return met / sum(weights)


def median(values: Sequence[float]) -> float:
    """Return the median, always one of the values."""
    return sorted(values)[len(values) // 2]


def trace_of(
    costs: Costs, load: float, num_replicas: int, duration_s: float, slack: float, said: float
) -> tuple[Sent, ...]:
    """Return a trace of Poisson arrivals.

    The share `said` of them has a deadline, of `slack` times the unloaded latency.
    """
    dice = random.Random(0)
    weights = [shape.weight for shape in SHAPES]
    work_s = sum(shape.weight * costs[shape].cost_s for shape in SHAPES) / sum(weights)
    trace = []
    for at_s in poisson(load * num_replicas / work_s, duration_s, dice):
        shape = dice.choices(SHAPES, weights)[0]
        is_said = dice.random() < said
        trace.append(Sent(at_s, shape, slack * costs[shape].unloaded_s if is_said else None))
    return tuple(trace)


def new_policy(name: str) -> QueuePolicy:
    """Return a new policy of that name; opponents have no queue bound, as they have for users."""
    if name == OURS:
        return TierQueue()
    if name == "fifo":
        return Fifo()
    choices = {
        "power_of_two": power_of_two,
        "round_robin": round_robin,
        "least_requests": least_requests,
    }
    return EarlyBinding(choices[name]())


POLICIES = (OURS, SERVE_DEFAULT, "round_robin", "least_requests", "fifo")


class WatchedQueue(CountedQueue):
    """A queue that notes when each request was done: the simulator reports only sums."""

    def __init__(self, queue: QueuePolicy) -> None:
        super().__init__(queue)
        self.done_at: dict[str, float] = {}

    def finish(self, ticket_id: str, now: float) -> None:
        """Note the time at which a request is done."""
        self.done_at[ticket_id] = now
        super().finish(ticket_id, now)


def play(
    trace: Sequence[Sent],
    costs: Costs,
    policy: str,
    num_replicas: int,
    services_s: Sequence[float | None] = (),
) -> Played:
    """Simulate the trace: each request takes the seconds of a measured one of its shape.

    It occupies a replica for its stages, and for `between_s` under our policy; the rest of its
    latency passes elsewhere. `services_s`: the seconds that the stages of each really took, to be
    used instead.
    """
    dice = random.Random(1)
    arrivals, outside_s = [], []
    for sent, service_s in itertools.zip_longest(trace, services_s):
        measured = costs[sent.shape]
        number = dice.randrange(len(measured.service_s))
        between_s = measured.between_s if policy == OURS else 0.0
        held_s = measured.service_s[number] + between_s
        outside_s.append(measured.latency_s[number] - held_s)
        limit_s = NO_LIMIT_S if sent.deadline_s is None else sent.deadline_s
        actual_s = held_s if service_s is None else service_s + between_s
        arrivals.append(Arrival(sent.at_s, TIER, measured.cost_s, limit_s, actual_s=actual_s))
    queue = WatchedQueue(new_policy(policy))
    simulate(arrivals, [ReplicaPool(TIER, queue, num_replicas)])
    # The simulator numbers requests in the order of their arrival.
    done = [queue.done_at.get(str(number)) for number in range(len(trace))]
    latencies = (
        None if at is None else at - sent.at_s + extra_s
        for at, sent, extra_s in zip(done, trace, outside_s, strict=True)
    )
    return Played(tuple(trace), tuple(latencies))


def ticket_of(ticket_id: str, now: float) -> QueuedRequest:
    """Return a queued request for policies that look at neither cost nor deadline."""
    return QueuedRequest(ticket_id, TIER, 1.0, now + NO_LIMIT_S)
