"""What requests ask for: sizes, steps, references and callers, shaped after published workloads.

When requests come: Poisson, bursty, diurnal and burst streams of times, from a seed.

Trace files: JSON lines of arrivals in the order of time, read and written one by one.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.router.trace import BadTrace, TracedRequest, line_of, parse_line

Pattern = Literal["poisson", "bursty", "diurnal", "burst"]
DAY_S = 86_400.0
# A day's traffic swings by this part of its mean, and by some noise from one slot to the next.
DIURNAL_SWING = 0.6
NOISE_SIGMA = 0.15
NOISE_SLOT_S = 300.0
BURST_FACTOR = 10.0
BURST_S = 120.0
BURSTY_CV = 3.0


def times_for(
    pattern: Pattern, rate_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Arrivals of one of the patterns, in seconds from 0 until `duration_s`, at that mean rate.

    `burst` has its mean rate outside the burst, which lies in the middle.
    """
    if rate_per_s <= 0:
        return iter(())
    if pattern == "poisson":
        return poisson(rate_per_s, duration_s, rng)
    if pattern == "bursty":
        return bursty(rate_per_s, duration_s, rng)
    if pattern == "diurnal":
        return diurnal(rate_per_s, duration_s, rng)
    return burst(rate_per_s, duration_s, rng)


def poisson(rate_per_s: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Callers who know nothing of each other."""
    return bursty(rate_per_s, duration_s, rng, cv=1.0)


def bursty(
    rate_per_s: float, duration_s: float, rng: random.Random, cv: float = BURSTY_CV
) -> Iterator[float]:
    """Gamma gaps whose standard deviation is `cv` times their mean; 1 is Poisson.

    The usual model of bursty inference traffic (BurstGPT, arXiv 2401.17644, fits its gaps by it).
    """
    shape = cv**-2
    scale_s = cv**2 / rate_per_s
    at_s = rng.gammavariate(shape, scale_s)
    while at_s < duration_s:
        yield at_s
        at_s += rng.gammavariate(shape, scale_s)


def burst(
    rate_per_s: float,
    duration_s: float,
    rng: random.Random,
    start_s: float | None = None,
    burst_s: float = BURST_S,
    factor: float = BURST_FACTOR,
) -> Iterator[float]:
    """Poisson, `factor` times as many from `start_s` (half-way, if not said) for `burst_s`."""
    begins_s = (duration_s - burst_s) / 2 if start_s is None else start_s

    def rate_at(at_s: float) -> float:
        return rate_per_s * (factor if begins_s <= at_s < begins_s + burst_s else 1.0)

    return thinned(rate_at, rate_per_s * factor, duration_s, rng)


def diurnal(
    rate_per_s: float, duration_s: float, rng: random.Random, day_s: float = DAY_S
) -> Iterator[float]:
    """A sinusoid over the day, least at its beginning, with log-normal noise every five minutes."""
    factors: list[float] = []
    most = 3.0 * rate_per_s

    def rate_at(at_s: float) -> float:
        # The mean of the noise is 1, so that the mean rate stays.
        while len(factors) <= at_s // NOISE_SLOT_S:
            factors.append(rng.lognormvariate(-(NOISE_SIGMA**2) / 2, NOISE_SIGMA))
        swing = 1 - DIURNAL_SWING * math.cos(2 * math.pi * at_s / day_s)
        return min(most, rate_per_s * swing * factors[-1])

    return thinned(rate_at, most, duration_s, rng)


def thinned(
    rate_at: Callable[[float], float], most_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Poisson arrivals of a rate that changes, by thinning (Lewis and Shedler, 1979)."""
    at_s = rng.expovariate(most_per_s)
    while at_s < duration_s:
        if rng.random() * most_per_s < rate_at(at_s):
            yield at_s
        at_s += rng.expovariate(most_per_s)


def read_trace(path: Path) -> Iterator[TracedRequest]:
    """The entries, one at a time: a million of them need no memory.

    Of a folder those of all its files, as the gateways of a cluster recorded them, set aside or
    not. BadTrace names the line and the key that is wrong; arrivals must not go back in time.
    """
    if not path.is_dir():
        return read_file(path)
    files = sorted(path.glob("*.jsonl*"))
    if not files:
        raise BadTrace(f"{path} has no traces: *.jsonl")
    return heapq.merge(*map(read_file, files), key=attrgetter("at_s"))


def read_file(path: Path) -> Iterator[TracedRequest]:
    """Of one file."""
    last_s = 0.0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                entry = entry_at(path, number, line)
                if entry.at_s < last_s:
                    raise at_line(path, number, f"at_s: {entry.at_s:g} is before {last_s:g}")
                last_s = entry.at_s
                yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path} cannot be read: {error}") from None


def entry_at(path: Path, number: int, line: str) -> TracedRequest:
    """The entry of one line."""
    try:
        return parse_line(line)
    except BadTrace as error:
        raise at_line(path, number, str(error)) from None


def at_line(path: Path, number: int, reason: str) -> BadTrace:
    """The error that says where."""
    return BadTrace(f"{path} line {number}: {reason}")


def write_trace(path: Path, entries: Iterable[TracedRequest]) -> int:
    """Write the entries as they come; how many there were."""
    num_entries = 0
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(f"{line_of(entry)}\n")
            num_entries += 1
    return num_entries


def from_zero(entries: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
    """The same arrivals, the first at 0: what was recorded begins at the clock of its cluster."""
    first_s: float | None = None
    for entry in entries:
        first_s = entry.at_s if first_s is None else first_s
        yield replace(entry, at_s=entry.at_s - first_s)


def last_arrival_s(path: Path) -> float:
    """Seconds from the first arrival to the last; 0 for an empty trace. Reads all of it."""
    at_s = 0.0
    for entry in from_zero(read_trace(path)):
        at_s = entry.at_s
    return at_s


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
# How many reference images: an assumption of ours, one request in four being an edit.
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
