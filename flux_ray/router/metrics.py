"""The metrics of a gateway: what its router counts of requests, and what is looked at now and then.

`RouterMetrics` counts prices, their errors, waits, promises, refusals and limits. `GatewayGauges`
shows what a gateway holds and whether it hears the ledger, and `JobGauges` the jobs.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from flux_ray.meter import SHOW_S, add, counter, gauge, histogram
from flux_ray.metrics import (
    COST_ERROR,
    GPU_SECONDS_SPENT,
    HELD_BYTES,
    JOBS,
    LEDGER_REACHABLE,
    LEDGER_SECONDS,
    LIMITED,
    MAX_HELD_BYTES,
    OLDEST_JOB_SECONDS,
    PRICED_SECONDS,
    PROMISES,
    QUEUE_SECONDS,
    QUEUE_SECONDS_SPENT,
    REFUSED,
    REPLICA_GPUS,
    RETRIES,
    UPSAMPLED,
    UPSAMPLING_SECONDS,
    WEBHOOKS,
)
from flux_ray.router.pricing import Observation


class RouterMetrics:
    """The metrics of one gateway, counted by its router."""

    def __init__(self) -> None:
        self._seconds = counter(PRICED_SECONDS)
        self._errors = histogram(COST_ERROR)
        self._refused = counter(REFUSED)
        self._limited = counter(LIMITED)
        self._retries = counter(RETRIES)
        self._promises = counter(PROMISES)
        self._waits = histogram(QUEUE_SECONDS)
        self._queued = counter(QUEUE_SECONDS_SPENT)
        self._spent = counter(GPU_SECONDS_SPENT)
        self._round_trips = histogram(LEDGER_SECONDS)
        self._upsampled = counter(UPSAMPLED)
        self._upsampling = histogram(UPSAMPLING_SECONDS)

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """Count the price of an admitted request, in GPU seconds."""
        self._seconds.inc(gpu_seconds, {"tier": tier})

    def wait(self, tier: str, seconds: float) -> None:
        """Count how long a request waited in the queue."""
        self._waits.observe(seconds, {"tier": tier})
        add(self._queued, seconds, {"tier": tier})

    def spend(self, tier: str, gpu_seconds: float, key_class: str) -> None:
        """Count what a finished request took, in GPU seconds."""
        add(self._spent, gpu_seconds, {"tier": tier, "key_class": key_class})

    def compare(self, observations: Iterable[Observation]) -> None:
        """Count how far each stage's measured time was from its price."""
        for seen in observations:
            self._errors.observe(seen.error, {"tier": seen.tier, "stage": seen.stage})

    def refuse(self, tier: str, reason: str, times: int = 1) -> None:
        """Count requests that were refused, by the code of their error."""
        self._refused.inc(times, {"tier": tier, "reason": reason})

    def limit(self, tier: str, limit: str) -> None:
        """Count a request that exceeded this limit of its key."""
        self._limited.inc(1, {"tier": tier, "limit": limit})

    def retry(self, tier: str) -> None:
        """Count a request that is sent to a second replica, because the first one failed."""
        self._retries.inc(1, {"tier": tier})

    def settle(self, tier: str, key_class: str, *, is_kept: bool) -> None:
        """Count a request that had its images by its deadline, or had not."""
        outcome = "kept" if is_kept else "missed"
        self._promises.inc(1, {"tier": tier, "key_class": key_class, "outcome": outcome})

    def upsample(self, tier: str, key_class: str, outcome: str, seconds: float) -> None:
        """Count a prompt that was to be upsampled, and how long its request waited for that."""
        self._upsampled.inc(1, {"tier": tier, "key_class": key_class, "outcome": outcome})
        # From the cache, or without a call, it takes no time.
        if outcome not in ("cached", "skipped"):
            self._upsampling.observe(seconds, {"tier": tier})

    def hear(self, seconds: float) -> None:
        """Count how long the ledger took to answer a report."""
        self._round_trips.observe(seconds, {})


class GatewayGauges:
    """What one gateway shows of itself, every few seconds.

    `held_bytes` and `num_refused` ask its memory budget: the bytes held, and how many requests it
    has refused so far. `replica_gpus` returns the GPUs of one replica by tier.
    """

    def __init__(
        self,
        metrics: RouterMetrics,
        max_held_bytes: int,
        held_bytes: Callable[[], int],
        num_refused: Callable[[], int],
        hears_ledger: Callable[[], bool],
        replica_gpus: Callable[[], Mapping[str, float]],
    ) -> None:
        self._metrics = metrics
        self._max_held_bytes = max_held_bytes
        self._held_bytes = held_bytes
        self._num_refused = num_refused
        self._hears_ledger = hears_ledger
        self._replica_gpus = replica_gpus
        self._num_counted = 0
        self._held, self._max_held = gauge(HELD_BYTES), gauge(MAX_HELD_BYTES)
        self._reachable, self._gpus = gauge(LEDGER_REACHABLE), gauge(REPLICA_GPUS)

    async def run(self) -> None:
        """Show them for ever."""
        while True:
            self.show()
            await asyncio.sleep(SHOW_S)

    def show(self) -> None:
        """Set the gauges, and count what the memory budget has refused since the last time."""
        self._held.set(self._held_bytes(), {})
        self._max_held.set(self._max_held_bytes, {})
        self._reachable.set(int(self._hears_ledger()), {})
        for tier, num_gpus in self._replica_gpus().items():
            self._gpus.set(num_gpus, {"tier": tier})
        if (new := self._num_refused() - self._num_counted) > 0:
            # The body is not read yet, so nobody knows the tier.
            self._metrics.refuse("unknown", "memory", new)
            self._num_counted += new


class JobGauges:
    """The jobs and webhooks of the database by state, as this gateway last counted them."""

    def __init__(self) -> None:
        self._jobs, self._oldest = gauge(JOBS), gauge(OLDEST_JOB_SECONDS)
        self._webhooks = gauge(WEBHOOKS)
        # What was shown once is shown as 0 when it is gone, and not as it last was. The first that
        # is due or given up is a rise from 0.
        self._known: set[tuple[str, str]] = set()
        self._known_webhooks = {"due", "given up"}

    def show(
        self,
        jobs: Mapping[tuple[str, str], int],
        oldest_s: Mapping[str, float],
        webhooks: Mapping[str, int],
    ) -> None:
        """Set the gauges: jobs by tier and state, the age of the oldest that waits, webhooks."""
        self._known |= jobs.keys()
        self._known |= {(tier, state) for tier, _ in jobs for state in ("pending", "running")}
        self._known_webhooks |= webhooks.keys()
        for tier, state in self._known:
            self._jobs.set(jobs.get((tier, state), 0), {"tier": tier, "state": state})
        for tier in {tier for tier, _ in self._known}:
            self._oldest.set(oldest_s.get(tier, 0.0), {"tier": tier})
        for state in self._known_webhooks:
            self._webhooks.set(webhooks.get(state, 0), {"state": state})
