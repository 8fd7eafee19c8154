"""Queue the requests of a tier: admit them, order them, assign them to replicas. Pure objects."""

from flux_ray.router.queue.admission import Forecast
from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection
from flux_ray.router.queue.tier_queue import TierQueue

__all__ = [
    "Assignment",
    "Forecast",
    "QueuedRequest",
    "RejectedEntry",
    "Rejection",
    "TierQueue",
]
