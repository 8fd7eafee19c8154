"""Generate traces of requests from a seed, and read and write trace files.

Arrival times follow one of four patterns: poisson, bursty, diurnal or burst. Sizes, steps,
references and callers are shaped after published workloads. Trace files are read and written one
line at a time, so that their length takes no memory.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

from flux_ray.catalog import Tier, tier_for
from flux_ray.router.trace import BadTrace, TracedRequest, line_of, parse_line

Pattern = Literal["poisson", "bursty", "diurnal", "burst"]
DAY_S = 86_400.0
# A day's traffic swings by this share of its mean, and by noise from one slot of time to the next.
DIURNAL_SWING = 0.6
NOISE_SIGMA = 0.15
NOISE_SLOT_S = 300.0
BURST_FACTOR = 10.0
BURST_S = 120.0
BURSTY_CV = 3.0


def times_for(
    pattern: Pattern, rate_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Generate arrival times of a pattern, in seconds from 0 to `duration_s`.

    `rate_per_s` is the mean rate; for `burst`, that outside of the burst, which is in the middle.
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
    """Generate the arrival times of independent callers, a Poisson process."""
    return bursty(rate_per_s, duration_s, rng, cv=1.0)


def bursty(
    rate_per_s: float, duration_s: float, rng: random.Random, cv: float = BURSTY_CV
) -> Iterator[float]:
    """Generate arrival times with gamma gaps of standard deviation `cv` times their mean.

    A `cv` of 1 is Poisson. This is the usual model of bursty inference traffic (BurstGPT, arXiv
    2401.17644, fits its gaps by it).
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
    """Generate Poisson arrivals with `factor` times the rate for `burst_s` from `start_s` on.

    Without `start_s` the burst is in the middle.
    """
    begins_s = (duration_s - burst_s) / 2 if start_s is None else start_s

    def rate_at(at_s: float) -> float:
        return rate_per_s * (factor if begins_s <= at_s < begins_s + burst_s else 1.0)

    return thinned(rate_at, rate_per_s * factor, duration_s, rng)


def diurnal(
    rate_per_s: float, duration_s: float, rng: random.Random, day_s: float = DAY_S
) -> Iterator[float]:
    """Generate arrivals at a rate that is a sinusoid over the day, with log-normal noise.

    The rate is least at the beginning of the day; the noise changes every five minutes.
    """
    factors: list[float] = []
    most = 3.0 * rate_per_s

    def rate_at(at_s: float) -> float:
        # The mean of the noise is 1, so that it does not change the mean rate.
        while len(factors) <= at_s // NOISE_SLOT_S:
            factors.append(rng.lognormvariate(-(NOISE_SIGMA**2) / 2, NOISE_SIGMA))
        swing = 1 - DIURNAL_SWING * math.cos(2 * math.pi * at_s / day_s)
        return min(most, rate_per_s * swing * factors[-1])

    return thinned(rate_at, most, duration_s, rng)


def thinned(
    rate_at: Callable[[float], float], most_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Generate Poisson arrivals of a changing rate by thinning (Lewis and Shedler, 1979).

    `rate_at` must never exceed `most_per_s`.
    """
    at_s = rng.expovariate(most_per_s)
    while at_s < duration_s:
        if rng.random() * most_per_s < rate_at(at_s):
            yield at_s
        at_s += rng.expovariate(most_per_s)


def read_trace(path: Path) -> Iterator[TracedRequest]:
    """Read the entries of a trace one at a time, so that a million of them take no memory.

    Of a folder, merge all files that the gateways of a cluster recorded, those set aside included.
    BadTrace names the line and the key that is wrong; arrivals must not go back in time.
    """
    if not path.is_dir():
        return read_file(path)
    files = sorted(path.glob("*.jsonl*"))
    if not files:
        raise BadTrace(f"{path} has no traces: *.jsonl")
    return heapq.merge(*map(read_file, files), key=attrgetter("at_s"))


def read_file(path: Path) -> Iterator[TracedRequest]:
    """Read the entries of one trace file, one at a time."""
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
    """Return the entry of one line; BadTrace names the file, the line and the key."""
    try:
        return parse_line(line)
    except BadTrace as error:
        raise at_line(path, number, str(error)) from None


def at_line(path: Path, number: int, reason: str) -> BadTrace:
    """Return the error that names the file and the line."""
    return BadTrace(f"{path} line {number}: {reason}")


def write_trace(path: Path, entries: Iterable[TracedRequest]) -> int:
    """Write the entries as they come, and return how many there were."""
    num_entries = 0
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(f"{line_of(entry)}\n")
            num_entries += 1
    return num_entries


def from_zero(entries: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
    """Shift arrivals so that the first is at 0; recorded times are on the cluster's clock."""
    first_s: float | None = None
    for entry in entries:
        first_s = entry.at_s if first_s is None else first_s
        yield replace(entry, at_s=entry.at_s - first_s)


def last_arrival_s(path: Path) -> float:
    """Return the seconds from first to last arrival, 0 for an empty trace; this reads all of it."""
    at_s = 0.0
    for entry in from_zero(read_trace(path)):
        at_s = entry.at_s
    return at_s


@dataclass(frozen=True)
class Shape:
    """A kind of request: its side and steps as shares of the tier's defaults, and how often."""

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
# How many reference images a request has. That one in four is an edit is an assumption of ours.
REFERENCES = (0, 1, 2, 3)
REFERENCE_WEIGHTS = (0.75, 0.17, 0.05, 0.03)
# Some callers send far more than others: the n-th sends 1/n of what the first does (Zipf).
NUM_KEYS = 20
KEYS = tuple(f"key-{number}" for number in range(1, NUM_KEYS + 1))
KEY_WEIGHTS = tuple(1 / number for number in range(1, NUM_KEYS + 1))


@dataclass(frozen=True)
class Traffic:
    """The traffic of a tier: requests per second, in one of the patterns."""

    tier: str
    rate_per_s: float
    pattern: Pattern = "poisson"


def generate(traffics: Sequence[Traffic], duration_s: float, seed: int) -> Iterator[TracedRequest]:
    """Generate the arrivals of all tiers in order of time; the same seed gives the same ones.

    Each tier's seed is derived from its name, so that other tiers do not change its traffic.
    """
    streams = [stream_of(traffic, duration_s, seed) for traffic in traffics]
    return heapq.merge(*streams, key=lambda entry: entry.at_s)


def stream_of(traffic: Traffic, duration_s: float, seed: int) -> Iterator[TracedRequest]:
    """Generate the arrivals of one tier, in order of time."""
    times_rng = random.Random(f"{seed} times of {traffic.tier}")
    shapes_rng = random.Random(f"{seed} shapes of {traffic.tier}")
    tier = tier_for(traffic.tier)
    for at_s in times_for(traffic.pattern, traffic.rate_per_s, duration_s, times_rng):
        yield request_at(at_s, tier, shapes_rng)


def sample_of(tier: str, num_requests: int, seed: int = 0) -> list[TracedRequest]:
    """Return requests of the tier's mix, all at 0, to compute what one costs on average."""
    rng = random.Random(f"{seed} sample of {tier}")
    return [request_at(0.0, tier_for(tier), rng) for _ in range(num_requests)]


def request_at(at_s: float, tier: Tier, rng: random.Random) -> TracedRequest:
    """Return a random request of the mix, within what the tier allows."""
    shape = rng.choices(SHAPES, [shape.weight for shape in SHAPES])[0]
    side = side_for(tier, shape)
    # A distilled tier was trained for its number of steps; traffic asks for no other.
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
        forwards=tier.num_forwards,
    )


def side_for(tier: Tier, shape: Shape) -> int:
    """Return the side in pixels: a multiple of `size_multiple`, within the tier's bounds."""
    wanted = round(tier.default_side * shape.side / tier.size_multiple) * tier.size_multiple
    largest = math.isqrt(tier.max_pixels) // tier.size_multiple * tier.size_multiple
    return min(max(wanted, tier.min_side), tier.max_side, largest)
