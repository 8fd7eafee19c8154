"""Every metric once: its name, its labels and its buckets. Prometheus sees them as ray_<name>."""

from dataclasses import dataclass

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One metric; a histogram has buckets, a counter has none."""

    name: str
    description: str
    labels: tuple[str, ...] = ("tier",)
    buckets: tuple[float, ...] = ()


IMAGES = Metric("flux_images", "Pictures drawn.")
STAGE_SECONDS = Metric(
    "flux_stage_seconds",
    "Seconds of one call to the ranks: encode, prepare, denoise (one step), decode; and of the "
    "shared text encoder, where there is one: prompt.",
    labels=("tier", "stage"),
    buckets=SECONDS,
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
