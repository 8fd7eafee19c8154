"""Define every metric once: its name, labels and buckets. Prometheus sees them as ray_<name>."""

from dataclasses import dataclass

# Each bound is at most twice the one before, because a quantile is known only to its bucket.
SECONDS = (
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0),
    *(5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 450.0, 600.0),
)


@dataclass(frozen=True)
class Metric:
    """One metric; a histogram has buckets, a counter has none."""

    name: str
    description: str
    labels: tuple[str, ...] = ("tier",)
    buckets: tuple[float, ...] = ()


IMAGES = Metric("flux_images", "Images generated.")
STAGE_SECONDS = Metric(
    "flux_stage_seconds",
    "Seconds of one call to the ranks: encode, prepare, denoise (one step), preview, decode; of "
    "the shared text encoder, where there is one: prompt; and of making an image's file, while the "
    "ranks go on: file.",
    labels=("tier", "stage"),
    buckets=SECONDS,
)
# Ray estimates the sum of a histogram from the middles of its buckets. So means and shares of time
# have to be taken from counters like this one.
STAGE_SECONDS_SPENT = Metric(
    "flux_stage_spent_seconds",
    "Seconds that calls to the ranks took, added up, by stage as flux_stage_seconds.",
    labels=("tier", "stage"),
)
QUEUE_SECONDS_SPENT = Metric(
    "flux_queue_spent_seconds",
    "Seconds that requests waited for their turn on a replica, added up, when they got it.",
)
GPU_SECONDS_SPENT = Metric(
    "flux_gpu_spent_seconds",
    "GPU seconds that finished requests took, added up: replica seconds times the replica's GPUs.",
)
REQUEST_SECONDS = Metric(
    "flux_request_seconds",
    "Seconds of a request in its replica, waiting included.",
    buckets=SECONDS,
)
REQUESTS = Metric(
    "flux_requests",
    "Requests that a replica ended: drawn, left (by their client) or failed.",
    labels=("tier", "outcome"),
)
# A logarithm, because |predicted / measured - 1| stays below 1 however far too low a price is. If
# it is small, it is the relative error.
COST_ERROR = Metric(
    "flux_cost_error",
    "How wrong a price was, |ln(measured / predicted)|, by stage: encode, denoise, decode.",
    labels=("tier", "stage"),
    buckets=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0),
)
PRICED_SECONDS = Metric(
    "flux_priced_gpu_seconds",
    "GPU seconds that requests were priced at: replica seconds times the replica's GPUs.",
)
REFUSED = Metric("flux_refused", "Requests that could not be done by their deadline.")
LIMITED = Metric(
    "flux_limited",
    "Requests that were more than their key may have, by the limit: max_concurrent, "
    "requests_per_minute, gpu_seconds_per_day, megapixels_per_day.",
    labels=("tier", "limit"),
)
HUNG = Metric(
    "flux_hung_replicas",
    "Gateways, leaders, text encoders and controllers that hung, and were ended.",
    labels=("process",),
)
