"""What a router counts of each request: `RequestMetrics`, and whether it kept its promise.

A promise is kept if the images come by the request's deadline, whichever tier of an alias made
them.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from flux_ray.errors import BadRequest, RateLimited
from flux_ray.router.pricing import Observation
from flux_ray.router.quote import Caller


class RequestMetrics(Protocol):
    """The counters of prices, their errors and refusals: `RouterMetrics`, or a fake in tests."""

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """Count the price of an admitted request, in GPU seconds."""

    def wait(self, tier: str, seconds: float) -> None:
        """Count how long a request waited for its turn."""

    def spend(self, tier: str, gpu_seconds: float, key_class: str) -> None:
        """Count what a finished request took, in GPU seconds."""

    def compare(self, observations: Iterable[Observation]) -> None:
        """Count how far measured times were from predicted ones."""

    def refuse(self, tier: str, reason: str) -> None:
        """Count a request that was refused, by the code of its error."""

    def retry(self, tier: str) -> None:
        """Count a request that is sent to a second replica, because the first one failed."""

    def upsample(self, tier: str, key_class: str, outcome: str, seconds: float) -> None:
        """Count a prompt that was to be upsampled, and how long its request waited for that."""

    def settle(self, tier: str, key_class: str, *, is_kept: bool) -> None:
        """Count a request that had its images by its deadline, or had not."""


@contextmanager
def promised(
    metrics: RequestMetrics, caller: Caller, deadline_s: float
) -> Iterator[Callable[[str], None]]:
    """Count whether the block succeeds within `deadline_s`; call what it yields with each tier.

    The last tier that was tried is the one that counts. Nothing is counted if the client leaves,
    asks for what cannot be, or is over a limit of its key; nor of jobs, for which nobody waits.
    """
    began, tiers = time.monotonic(), [""]
    is_kept: bool | None = False
    try:
        yield tiers.append
        is_kept = time.monotonic() - began <= deadline_s
    except (asyncio.CancelledError, BadRequest, RateLimited):
        is_kept = None
        raise
    finally:
        if is_kept is not None and not caller.is_job:
            metrics.settle(tiers[-1], caller.key_class, is_kept=is_kept)
