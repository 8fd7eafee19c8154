"""What the reality bench sends: a mix of requests, when they come, and what became of them."""

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
# What a gateway gives a request that says nothing.
NO_LIMIT_S = 600.0


@dataclass(frozen=True)
class Shape:
    """A size in pixels, steps and images; and how many of a hundred requests are such."""

    side: int
    steps: int
    images: int
    weight: int

    @property
    def fields(self) -> dict[str, object]:
        """Of the body of a request."""
        size = f"{self.side}x{self.side}"
        return {"model": TIER, "size": size, "steps": self.steps, "n": self.images}


SHAPES = (Shape(128, 20, 1, 70), Shape(192, 20, 1, 20), Shape(192, 20, 4, 10))


@dataclass(frozen=True)
class Measured:
    """A shape's requests that wait for nobody: seconds of their stages, and in all.

    `between_s`: for how long our replica is taken beside them; end and next grant travel in it.
    """

    service_s: tuple[float, ...]
    latency_s: tuple[float, ...]
    between_s: float

    @property
    def unloaded_s(self) -> float:
        """The median answer without a wait."""
        return median(self.latency_s)

    @property
    def cost_s(self) -> float:
        """The median work of a replica."""
        return median(self.service_s)


Costs = Mapping[Shape, Measured]


@dataclass(frozen=True)
class Sent:
    """One request of a trace; a deadline that nobody says is None."""

    at_s: float
    shape: Shape
    deadline_s: float | None


@dataclass(frozen=True)
class Played:
    """What became of a trace: the latency of every request, None for one that was refused.

    `services_s`: what each of them really took of its replica, where that was seen.
    """

    trace: tuple[Sent, ...]
    latencies_s: tuple[float | None, ...]
    services_s: tuple[float | None, ...] = ()

    @property
    def num_refused(self) -> int:
        """Those that never got an image."""
        return self.latencies_s.count(None)

    def quantile(self, share: float) -> float:
        """Of the latencies of all that were served."""
        served = sorted(latency for latency in self.latencies_s if latency is not None)
        return served[min(int(share * len(served)), len(served) - 1)] if served else math.nan

    @property
    def met(self) -> list[bool]:
        """Whether each request met its deadline."""
        return [
            latency_s is not None and latency_s <= (sent.deadline_s or math.inf)
            for sent, latency_s in zip(self.trace, self.latencies_s, strict=True)
        ]

    def attainment(self, costs: Costs | None = None) -> float:
        """The share that met its deadline; by the seconds of `costs`, where they are given."""
        weights = [1.0 if costs is None else costs[sent.shape].cost_s for sent in self.trace]
        met = sum(weight for weight, is_met in zip(weights, self.met, strict=True) if is_met)
        return met / sum(weights)


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def trace_of(
    costs: Costs, load: float, num_replicas: int, duration_s: float, slack: float, said: float
) -> tuple[Sent, ...]:
    """Poisson; this share of the requests says a deadline of `slack` unloaded answers."""
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
    """A fresh one; opponents as people have them, without a bound."""
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
    """Another queue, and when each ticket was done: the simulator tells only sums."""

    def __init__(self, queue: QueuePolicy) -> None:
        super().__init__(queue)
        self.done_at: dict[str, float] = {}

    def finish(self, ticket_id: str, now: float) -> None:
        """A granted ticket is done."""
        self.done_at[ticket_id] = now
        super().finish(ticket_id, now)


def play(
    trace: Sequence[Sent],
    costs: Costs,
    policy: str,
    num_replicas: int,
    services_s: Sequence[float | None] = (),
) -> Played:
    """The trace in simulated time: each request takes what one of its shape took alone.

    A replica is held for its stages, and ours also while it is told of; the rest passes outside.
    `services_s`: what the stages of each took, where that is known better.
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
    # The simulator numbers its tickets in the order of arrival.
    done = [queue.done_at.get(str(number)) for number in range(len(trace))]
    latencies = (
        None if at is None else at - sent.at_s + extra_s
        for at, sent, extra_s in zip(done, trace, outside_s, strict=True)
    )
    return Played(tuple(trace), tuple(latencies))


def ticket_of(ticket_id: str, now: float) -> QueuedRequest:
    """For policies that look at neither cost nor deadline."""
    return QueuedRequest(ticket_id, TIER, 1.0, now + NO_LIMIT_S)
