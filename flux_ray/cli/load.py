"""Send requests on a schedule to an OpenAI-compatible images server, and count what comes back.

The loop is open: a request goes out at its time whether or not earlier ones were answered, and its
latency counts from that time. So a server that stalls cannot hide it by keeping the client waiting.
"""

import asyncio
import io
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from PIL import Image

from flux_ray.router.trace import TracedRequest

Arrivals = Literal["poisson", "even"]
QUANTILES = (0.5, 0.9, 0.95, 0.99)
OK = "ok"
REFERENCE_SIDE = 512


@dataclass(frozen=True)
class PlannedRequest:
    """A request that is due `at_s` seconds after the start; `fields` are OpenAI's."""

    at_s: float
    fields: dict[str, Any]
    deadline_s: float | None = None
    num_references: int = 0


@dataclass(frozen=True)
class SentRequest:
    """What became of a request: `ok`, an HTTP status, or the name of an error.

    All times are in seconds since the start: when it was due, when it was sent, and its end.
    """

    due_s: float
    sent_s: float
    end_s: float
    outcome: str
    num_images: int = 0
    deadline_s: float | None = None

    @property
    def latency_s(self) -> float:
        """Return the seconds from when it was due to its end."""
        return self.end_s - self.due_s

    @property
    def is_in_time(self) -> bool:
        """Return whether it was answered with images by its deadline."""
        limit_s = float("inf") if self.deadline_s is None else self.deadline_s
        return self.outcome == OK and self.latency_s <= limit_s


def arrivals(rate: float, duration_s: float, pattern: Arrivals, seed: int) -> list[float]:
    """Return the times of requests, `rate` a second, at random or evenly spaced."""
    if pattern == "even":
        return [number / rate for number in range(round(rate * duration_s))]
    source, at_s, times = random.Random(seed), 0.0, []
    while (at_s := at_s + source.expovariate(rate)) < duration_s:
        times.append(at_s)
    return times


def from_trace(
    entries: Iterable[TracedRequest], prompts: Sequence[str], model: str | None, seed: int
) -> list[PlannedRequest]:
    """Return the requests of a trace; `model` replaces its tiers, for another server's names."""
    return [
        PlannedRequest(
            entry.at_s,
            {
                "model": model or entry.tier,
                "prompt": prompts[number % len(prompts)],
                "n": entry.images,
                "size": f"{entry.width}x{entry.height}",
                "num_inference_steps": entry.steps,
                "seed": seed + number,
            },
            entry.deadline_s,
            entry.references,
        )
        for number, entry in enumerate(entries)
    ]


class OpenLoop:
    """Sends planned requests at their times; at most `num_at_once` of them are under way."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        num_at_once: int,
        on_end: Callable[[SentRequest], None] = lambda sent: None,
    ) -> None:
        self._client = client
        self._places = asyncio.Semaphore(num_at_once)
        self._on_end = on_end
        self._start_s = 0.0

    async def run(self, planned: Iterable[PlannedRequest]) -> list[SentRequest]:
        """Send all requests and return what became of each, in the order of the plan."""
        self._start_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for each in planned:
                await asyncio.sleep(max(0.0, each.at_s - self._now_s()))
                tasks.append(group.create_task(self._send(each)))
        return [task.result() for task in tasks]

    async def _send(self, planned: PlannedRequest) -> SentRequest:
        async with self._places:
            sent_s = self._now_s()
            outcome, num_images = await self._outcome(planned)
        done = SentRequest(
            planned.at_s, sent_s, self._now_s(), outcome, num_images, planned.deadline_s
        )
        self._on_end(done)
        return done

    async def _outcome(self, planned: PlannedRequest) -> tuple[str, int]:
        try:
            response = await self._client.send(self._request(planned))
        except httpx.HTTPError as error:
            return type(error).__name__, 0
        if response.is_error:
            return str(response.status_code), 0
        num_images = images_in(response)
        return (OK, num_images) if num_images == planned.fields["n"] else ("images missing", 0)

    def _request(self, planned: PlannedRequest) -> httpx.Request:
        headers = {}
        if planned.deadline_s is not None:
            headers["x-flux-deadline-s"] = f"{planned.deadline_s:g}"
        if not planned.num_references:
            path = "/v1/images/generations"
            return self._client.build_request("POST", path, json=planned.fields, headers=headers)
        texts = {name: str(value) for name, value in planned.fields.items()}
        image = reference()
        files = [("image[]", ("reference.png", image))] * planned.num_references
        return self._client.build_request(
            "POST", "/v1/images/edits", data=texts, files=files, headers=headers
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s


def images_in(response: httpx.Response) -> int:
    """Return how many images an answer has, as base64 or by URL."""
    try:
        data = response.json()["data"]
        return sum(bool(each.get("b64_json") or each.get("url")) for each in data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def reference() -> bytes:
    """Return a reference image of noise that no server has encoded before."""
    file = io.BytesIO()
    side = REFERENCE_SIDE
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(
        file, "PNG", compress_level=0
    )
    return file.getvalue()


@dataclass(frozen=True)
class LoadSummary:
    """What a run came to; latencies are of answered requests, in seconds from when they were due.

    `lag_s`: how late the last hundredth of the requests was sent; if it is not small, the client or
    its limit of requests at once was the bottleneck.
    """

    num_sent: int
    num_ok: int
    outcomes: dict[str, int]
    num_images: int
    taken_s: float
    latency_s: dict[str, float]
    lag_s: float
    num_with_deadline: int
    num_in_time: int

    @property
    def images_per_s(self) -> float:
        """Return the images that were answered a second."""
        return self.num_images / self.taken_s if self.taken_s else 0.0

    @property
    def requests_per_s(self) -> float:
        """Return the requests that were answered with images a second."""
        return self.num_ok / self.taken_s if self.taken_s else 0.0


def summary_of(sent: Sequence[SentRequest]) -> LoadSummary:
    """Return what a run came to."""
    answered = [each for each in sent if each.outcome == OK]
    latencies = sorted(each.latency_s for each in answered)
    promised = [each for each in sent if each.deadline_s is not None]
    named = {f"p{round(share * 100)}": quantile(latencies, share) for share in QUANTILES}
    mean_s = sum(latencies) / len(latencies) if latencies else float("nan")
    return LoadSummary(
        num_sent=len(sent),
        num_ok=len(answered),
        outcomes=dict(Counter(each.outcome for each in sent).most_common()),
        num_images=sum(each.num_images for each in answered),
        taken_s=max((each.end_s for each in sent), default=0.0),
        latency_s={"mean": mean_s, **named, "max": quantile(latencies, 1.0)},
        lag_s=quantile(sorted(each.sent_s - each.due_s for each in sent), 0.99),
        num_with_deadline=len(promised),
        num_in_time=sum(each.is_in_time for each in promised),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the least value that at least this share of the values do not exceed; NaN of none."""
    if not ordered:
        return float("nan")
    # A hair less, as 0.95 * 20 may be a hair more than 19.
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
