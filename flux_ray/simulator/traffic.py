"""What requests ask for: sizes, steps, references and callers, shaped after published workloads."""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.router.trace import TracedRequest
from flux_ray.simulator.arrivals import Pattern, times_for


@dataclass(frozen=True)
class Shape:
    """A size as part of the tier's default side, steps as part of its default, and how often."""

    side: float
    steps: float
    weight: float


# The mix of vLLM-Omni's serving benchmark of image models (benchmarks/diffusion in
# github.com/vllm-project/vllm-omni): 512, 768, 1024 and 1536 pixels square, in 20, 20, 25 and 35
# steps, of a model whose defaults are 1024 and 50. No trace of image generation with arrival times
# is public; DiffusionDB (arXiv 2210.14896, CC0) is the usual stand-in for what people ask for.
SHAPES = (
    Shape(side=0.5, steps=0.4, weight=0.15),
    Shape(side=0.75, steps=0.4, weight=0.25),
    Shape(side=1.0, steps=0.5, weight=0.45),
    Shape(side=1.5, steps=0.7, weight=0.15),
)
# How many reference pictures: an assumption of ours, one request in four being an edit.
REFERENCES = (0, 1, 2, 3)
REFERENCE_WEIGHTS = (0.75, 0.17, 0.05, 0.03)
# Some callers send far more than others: the n-th sends 1/n of what the first does (Zipf).
NUM_KEYS = 20
KEYS = tuple(f"key-{number}" for number in range(1, NUM_KEYS + 1))
KEY_WEIGHTS = tuple(1 / number for number in range(1, NUM_KEYS + 1))


@dataclass(frozen=True)
class Traffic:
    """What a tier is sent: so many requests a second, in that pattern."""

    tier: str
    rate_per_s: float
    pattern: Pattern = "poisson"


def generate(traffics: Sequence[Traffic], duration_s: float, seed: int) -> Iterator[TracedRequest]:
    """The arrivals of all tiers in the order of time; the same seed gives the same ones.

    Each tier has a seed of its own, so that another tier's traffic does not change it.
    """
    streams = [stream_of(traffic, duration_s, seed) for traffic in traffics]
    return heapq.merge(*streams, key=lambda entry: entry.at_s)


def stream_of(traffic: Traffic, duration_s: float, seed: int) -> Iterator[TracedRequest]:
    """The arrivals of one tier."""
    times_rng = random.Random(f"{seed} times of {traffic.tier}")
    shapes_rng = random.Random(f"{seed} shapes of {traffic.tier}")
    tier = tier_for(traffic.tier)
    for at_s in times_for(traffic.pattern, traffic.rate_per_s, duration_s, times_rng):
        yield request_at(at_s, tier, shapes_rng)


def sample_of(tier: str, num_requests: int, seed: int = 0) -> list[TracedRequest]:
    """Requests of the tier's mix, all at 0: to learn what one costs on average."""
    rng = random.Random(f"{seed} sample of {tier}")
    return [request_at(0.0, tier_for(tier), rng) for _ in range(num_requests)]


def request_at(at_s: float, tier: Tier, rng: random.Random) -> TracedRequest:
    """One request of the mix, within what the tier allows."""
    shape = rng.choices(SHAPES, [shape.weight for shape in SHAPES])[0]
    side = side_for(tier, shape)
    # A distilled tier has its steps built in.
    steps = max(1, round(tier.num_steps * shape.steps)) if tier.is_guided else tier.num_steps
    references = rng.choices(REFERENCES, REFERENCE_WEIGHTS)[0]
    return TracedRequest(
        at_s=at_s,
        tier=tier.name,
        width=side,
        height=side,
        steps=steps,
        references=min(references, tier.max_references),
        key=rng.choices(KEYS, KEY_WEIGHTS)[0],
    )


def side_for(tier: Tier, shape: Shape) -> int:
    """The side in pixels: a multiple of the tier's step, between its least and its largest."""
    wanted = round(tier.default_side * shape.side / tier.size_multiple) * tier.size_multiple
    return min(max(wanted, tier.min_side), tier.max_side)
