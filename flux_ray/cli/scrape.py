"""Read flux-ray's own series from the metrics endpoints of a cluster's nodes.

`samples_in` reads Prometheus' text format, only as much of it as Ray writes. `Counted` sums series
by tier. A counter is known as a total since its process started; rates need two scrapes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import httpx

from flux_ray import metrics
from flux_ray.metrics import Metric

# A node that is gone must not hold up the table for long.
TIMEOUT_S = 3.0
PREFIX = "ray_flux_"
SERIES = re.compile(r"(\w+)\{(.*)\} (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class MetricSample:
    """One series of a scrape: its name without `ray_` and `_total`, its labels and its value."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples_in(text: str) -> Iterator[MetricSample]:
    """Yield flux-ray's series of a scrape, without the buckets of histograms."""
    for line in text.splitlines():
        if not line.startswith(PREFIX):
            continue
        if (found := SERIES.match(line)) and not found[1].endswith("_bucket"):
            name = found[1].removeprefix("ray_").removesuffix("_total")
            yield MetricSample(name, dict(LABEL.findall(found[2])), float(found[3]))


def scrape(targets: Iterable[str], session: str | None = None) -> list[MetricSample]:
    """Return flux-ray's series of all targets that answer, only those of that Ray session.

    Ray's own ports are the same for all of its clusters on a machine, hence the session.
    """
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client, ThreadPoolExecutor(16) as pool:
        texts = pool.map(lambda target: text_of(client, target), targets)
        return [
            sample
            for text in texts
            for sample in samples_in(text)
            if session is None or sample.labels.get("SessionName", session) == session
        ]


def text_of(client: httpx.Client, target: str) -> str:
    """Return what a target says, and nothing if it does not answer."""
    with suppress(httpx.HTTPError, httpx.InvalidURL):
        response = client.get(f"http://{target}/metrics")
        if response.is_success:
            return response.text
    return ""


@dataclass(frozen=True)
class Counted:
    """The series of one scrape at a time, in seconds of the monotonic clock."""

    samples: tuple[MetricSample, ...]
    at_s: float

    def total(self, metric: str, tier: str, **labels: str) -> float | None:
        """Return the sum of a metric's series of a tier; None if there is none.

        `metric` names an attribute of `flux_ray/metrics.py`. One that this release does not have
        is like one without series.
        """
        known = getattr(metrics, metric, None)
        if not isinstance(known, Metric):
            return None
        wanted = {"tier": tier, **labels}
        found = [
            sample.value
            for sample in self.samples
            if sample.name == known.name and wanted.items() <= sample.labels.items()
        ]
        return sum(found) if found else None


def rate(before: Counted | None, now: Counted, metric: str, tier: str) -> float | None:
    """Return how much a counter grew a second between two scrapes; None if that is not known.

    A total that fell, because a process ended, is no growth.
    """
    if before is None or now.at_s <= before.at_s:
        return None
    then, total = before.total(metric, tier), now.total(metric, tier)
    if total is None:
        return None
    return max(0.0, total - (then or 0.0)) / (now.at_s - before.at_s)
