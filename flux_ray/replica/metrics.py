"""What a replica counts."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flux_ray.meter import counter, histogram
from flux_ray.metrics import (
    IMAGES,
    REQUEST_SECONDS,
    REQUESTS,
    STAGE_SECONDS,
    STAGE_SECONDS_SPENT,
)
from flux_ray.request import ImageRequest


class ReplicaMetrics:
    """Counts what one replica of a tier does."""

    def __init__(self, tier: str) -> None:
        self._tier = {"tier": tier}
        self._images = counter(IMAGES)
        self._requests = counter(REQUESTS)
        self._request_seconds = histogram(REQUEST_SECONDS)
        self._stage_seconds = histogram(STAGE_SECONDS)
        self._spent = counter(STAGE_SECONDS_SPENT)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """One stage of a request."""
        labels = {**self._tier, "stage": stage}
        self._stage_seconds.observe(seconds, labels)
        # Ray's counters raise for nothing at all, which a coarse clock may say.
        if seconds > 0:
            self._spent.inc(seconds, labels)

    @contextmanager
    def count(self, request: ImageRequest) -> Iterator[None]:
        """A request, from its arrival to its end."""
        began, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "drawn"
            self._images.inc(request.num_images, self._tier)
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            self._requests.inc(1, {**self._tier, "outcome": outcome})
            self._request_seconds.observe(time.perf_counter() - began, self._tier)
