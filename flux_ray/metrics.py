"""Define every metric once: its name, labels and buckets. Prometheus sees them as ray_<name>.

What each of them tells an operator is in docs/monitoring.md.
"""

from dataclasses import dataclass

# Each bound is at most twice the one before, because a quantile is known only to its bucket.
SECONDS = (
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0),
    *(5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 450.0, 600.0),
)


@dataclass(frozen=True)
class Metric:
    """One metric: a gauge, a histogram if it has buckets, or else a counter."""

    name: str
    description: str
    labels: tuple[str, ...] = ("tier",)
    buckets: tuple[float, ...] = ()
    is_gauge: bool = False


IMAGES = Metric("flux_images", "Images generated.")
MEGAPIXELS = Metric("flux_megapixels", "Megapixels of the images generated.")
PROMISES = Metric(
    "flux_promises",
    "Requests, jobs excepted, whose images came by their deadline (kept), or did not (missed): "
    "they came late, failed, or were refused for want of time, room or replicas.",
    labels=("tier", "key_class", "outcome"),
)
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
QUEUE_SECONDS = Metric(
    "flux_queue_seconds",
    "Seconds that a request waited for its turn on a replica, when it got it.",
    buckets=SECONDS,
)
QUEUE_SECONDS_SPENT = Metric(
    "flux_queue_spent_seconds",
    "Seconds that requests waited for their turn on a replica, added up, when they got it.",
)
GPU_SECONDS_SPENT = Metric(
    "flux_gpu_spent_seconds",
    "GPU seconds that finished requests took, added up: replica seconds times the replica's GPUs.",
    labels=("tier", "key_class"),
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
REFUSED = Metric(
    "flux_refused",
    "Requests that were refused, by the code of the error: overloaded, deadline_too_short, "
    "tier_unavailable; of no tier yet, for want of memory: memory.",
    labels=("tier", "reason"),
)
RETRIES = Metric("flux_retries", "Requests that were sent to a second replica: the first failed.")
UPSAMPLED = Metric(
    "flux_upsampled_prompts",
    "Prompts that were to be upsampled, by what became of them: done, cached; used as they were "
    "sent as the LLM was late, busy or failed, or was skipped after failures in a row.",
    labels=("tier", "key_class", "outcome"),
)
UPSAMPLING_SECONDS = Metric(
    "flux_upsampling_seconds",
    "Seconds that a request waited for its prompt to be upsampled, whatever came of it.",
    buckets=SECONDS,
)
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
CACHE_LOOKUPS = Metric(
    "flux_cache_lookups",
    "Requests by whether any part of their encoding was in a replica's cache: hit or miss.",
    labels=("tier", "outcome"),
)
LOAD_SECONDS = Metric(
    "flux_load_seconds",
    "Seconds in which this replica loaded its weights, its processes' start included.",
    is_gauge=True,
)
BUILD_INFO = Metric(
    "flux_build_info",
    "1 for each replica, with what it runs: the version of flux-ray, weights and GPU.",
    labels=("tier", "version", "quantization", "card"),
    is_gauge=True,
)
QUEUED_REQUESTS = Metric("flux_queued_requests", "Requests that wait for a replica.", is_gauge=True)
QUEUED_SECONDS = Metric(
    "flux_queued_replica_seconds", "Replica seconds of the requests that wait.", is_gauge=True
)
REPLICA_GPUS = Metric(
    "flux_replica_gpus",
    "GPUs of one replica, by which replica seconds become GPU seconds; 1 on processors.",
    is_gauge=True,
)
WANTED_REPLICAS = Metric(
    "flux_wanted_replicas",
    "Replicas that the scaling policy wants, within bounds and GPU budget.",
    is_gauge=True,
)
NEEDED_REPLICAS = Metric(
    "flux_needed_replicas",
    "Why: the replicas needed for work that arrives (arrivals), for its waves, and to work off "
    "what waits (backlog), as fractions that add up to the need.",
    labels=("tier", "cause"),
    is_gauge=True,
)
HELD_BYTES = Metric(
    "flux_held_bytes", "Bytes of bodies and images that a gateway holds.", labels=(), is_gauge=True
)
MAX_HELD_BYTES = Metric(
    "flux_max_held_bytes",
    "How many it may hold: `max_held_bytes` without the share for decoding.",
    labels=(),
    is_gauge=True,
)
LEDGER_REACHABLE = Metric(
    "flux_ledger_reachable", "1 if the gateway hears the ledger, else 0.", labels=(), is_gauge=True
)
LEDGER_SECONDS = Metric(
    "flux_ledger_round_trip_seconds",
    "Seconds from a gateway's report to the ledger's reply.",
    labels=(),
    buckets=(0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, *SECONDS[:19]),
)
JOBS = Metric(
    "flux_jobs_by_state",
    "Jobs in the database by state: arriving, pending, running, and, as long as they are kept, "
    "ready, failed, moderated, cancelled. Every gateway reports the same.",
    labels=("tier", "state"),
    is_gauge=True,
)
OLDEST_JOB_SECONDS = Metric(
    "flux_oldest_job_seconds",
    "Seconds since the oldest job that waits was submitted; 0 if none waits.",
    is_gauge=True,
)
WEBHOOKS = Metric(
    "flux_webhooks",
    "Webhooks of jobs in the database, by state: waiting, due, delivered, given up.",
    labels=("state",),
    is_gauge=True,
)
