"""The panels of the dashboard: which query answers which question.

The first four rows are for one screen, the last one is for when something is wrong. The Serve page
of Ray's dashboard shows panels by their ids, 7, 8, 15 and 20 to 25, so these ids stay with what
they are about: requests, errors, time, work in hand, queues, and Serve's controller.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.monitoring.queries import HTTP, TIER, kept, latest, per_second, quantile


@dataclass(frozen=True)
class Panel:
    """A graph: its title and id, what it tells, and its queries with their legends.

    `kind` is `lines`, `stack`, `number` or `table`; `unit` is one of Grafana's.
    """

    title: str
    panel_id: int
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "lines"


PROMISE = (
    Panel(
        "Promises kept",
        1,
        "Share of the requests whose images came by their deadline, in the time shown.",
        ((kept(window="$__range"), "kept"),),
        "percentunit",
        "number",
    ),
    Panel(
        "Kept by tier",
        2,
        "The same share as it went. Jobs are not in it: nobody waits for them.",
        ((kept(" by (tier)"), "{{tier}}"),),
        "percentunit",
    ),
    Panel(
        "Requests a second",
        7,
        "Requests that replicas ended, by tier and by what became of them.",
        ((per_second("flux_requests", "tier, outcome"), "{{tier}} {{outcome}}"),),
        "reqps",
    ),
    Panel(
        "Missed and refused a second",
        8,
        "Promises missed by tier, and refusals by reason.",
        (
            (per_second("flux_promises", "tier", f'outcome="missed", {TIER}'), "{{tier}} missed"),
            (per_second("flux_refused", "reason", ""), "refused: {{reason}}"),
        ),
        "reqps",
    ),
    Panel(
        "Seconds of an answer, p90",
        15,
        "From the proxy to the last byte, by route: waiting, generating and files.",
        ((quantile(0.9, "serve_http_request_latency_ms", "route", HTTP) + " / 1000", "{{route}}"),),
        "s",
    ),
    Panel(
        "Seconds in the replica",
        3,
        "Of a request: its median, and what one in twenty exceeds.",
        (
            (quantile(0.5, "flux_request_seconds"), "{{tier}} p50"),
            (quantile(0.95, "flux_request_seconds"), "{{tier}} p95"),
        ),
        "s",
    ),
)
TIME = (
    Panel(
        "Replicas busy with",
        4,
        "Replica seconds per second by stage: where the time goes. File is made beside them.",
        ((per_second("flux_stage_spent_seconds", "stage"), "{{stage}}"),),
        "short",
        "stack",
    ),
    Panel(
        "Seconds of a stage, p50",
        5,
        "Of one call to the ranks; denoise is one step. It rises if a card slows down.",
        ((quantile(0.5, "flux_stage_seconds", "tier, stage"), "{{tier}} {{stage}}"),),
        "s",
    ),
    Panel(
        "Wait for a replica",
        6,
        "Mean, and what one in twenty exceeds.",
        (
            (
                per_second("flux_queue_spent_seconds", "tier")
                + f" / sum by (tier) (rate(ray_flux_queue_seconds_count{{{TIER}}}"
                "[$__rate_interval]))",
                "{{tier}} mean",
            ),
            (quantile(0.95, "flux_queue_seconds"), "{{tier}} p95"),
        ),
        "s",
    ),
    Panel(
        "GPUs in use: priced, measured",
        9,
        "GPU seconds per second. If the two part for long, prices are wrong.",
        (
            (per_second("flux_priced_gpu_seconds", "tier"), "{{tier}} priced"),
            (per_second("flux_gpu_spent_seconds", "tier"), "{{tier}} measured"),
        ),
    ),
    Panel(
        "Error of prices, median",
        10,
        "0.1 is ten per cent. Deadlines are kept by what prices say.",
        ((quantile(0.5, "flux_cost_error", "tier, stage"), "{{tier}} {{stage}}"),),
    ),
    Panel(
        "Encodings from the cache",
        11,
        "Share of the requests whose prompt or references a replica had encoded before.",
        (
            (
                per_second("flux_cache_lookups", "tier", f'outcome="hit", {TIER}')
                + " / "
                + per_second("flux_cache_lookups", "tier"),
                "{{tier}}",
            ),
        ),
        "percentunit",
    ),
)
SCALE = (
    Panel(
        "Requests that wait",
        22,
        "For a replica, in the ledger's queue of each tier.",
        ((latest("flux_queued_requests"), "{{tier}}"),),
    ),
    Panel(
        "Queued GPU seconds",
        21,
        "The work that waits. Divided by the tier's GPUs it is the wait of who comes now.",
        (
            (
                latest("flux_queued_replica_seconds")
                + " * on (tier) "
                + latest("flux_replica_gpus"),
                "{{tier}}",
            ),
        ),
        "s",
    ),
    Panel(
        "Replicas wanted, up",
        25,
        "What the scaling policy wants, for tiers that have one, and what Serve has. "
        "A shared text encoder is a line of its own.",
        (
            (latest("flux_wanted_replicas"), "{{tier}} wanted"),
            (
                'sum by (deployment) (ray_serve_deployment_replica_healthy{application=~"$tier"})',
                "{{deployment}} up",
            ),
        ),
    ),
    Panel(
        "Replicas needed, why",
        12,
        "Work that arrives, its waves, and the backlog. Less is wanted at a bound or budget.",
        ((latest("flux_needed_replicas", "tier, cause"), "{{tier}} {{cause}}"),),
        "short",
        "stack",
    ),
    Panel(
        "Replicas busy",
        13,
        "Share of the time of all replicas. Near 1 the queue grows with every request.",
        (
            (
                per_second("flux_stage_spent_seconds", "tier", f'stage!~"file|prompt", {TIER}')
                + f" / on (tier) count by (tier) (ray_flux_build_info{{{TIER}}})",
                "{{tier}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "Seconds to load",
        14,
        "From a replica's start until its weights are loaded: so late does scaling help.",
        ((latest("flux_load_seconds"), "{{tier}}"),),
        "s",
    ),
)
USERS = (
    Panel(
        "GPUs by class of key",
        16,
        "GPU seconds per second; none is callers without a class.",
        ((per_second("flux_gpu_spent_seconds", "key_class"), "{{key_class}}"),),
        "short",
        "stack",
    ),
    Panel(
        "Kept by class of key",
        17,
        "Share of the requests of each class that had their images by their deadline.",
        ((kept(" by (key_class)"), "{{key_class}}"),),
        "percentunit",
    ),
    Panel(
        "HTTP requests a second",
        18,
        "By route, which tells the API, and by status.",
        (
            (
                per_second("serve_num_http_requests", "route, status_code", HTTP),
                "{{route}} {{status_code}}",
            ),
        ),
        "reqps",
        "stack",
    ),
    Panel(
        "Images, megapixels a second",
        19,
        "Generated, by tier.",
        (
            (per_second("flux_images", "tier"), "{{tier}} images"),
            (per_second("flux_megapixels", "tier"), "{{tier}} megapixels"),
        ),
    ),
    Panel(
        "Over a limit of their key",
        26,
        "Requests a second above what their key may have, by the limit.",
        ((per_second("flux_limited", "limit"), "{{limit}}"),),
        "reqps",
    ),
    Panel(
        "Jobs",
        27,
        "In the database, by state.",
        (
            (
                "sum by (state) (max by (tier, state) "
                f'(ray_flux_jobs_by_state{{state=~"arriving|pending|running|failed", {TIER}}}))',
                "{{state}}",
            ),
        ),
    ),
)
WRONG = (
    Panel(
        "HTTP requests in hand",
        20,
        "By node. One that stays high on one node points to its gateway.",
        (("sum by (node_id) (ray_serve_num_ongoing_http_requests)", "{{node_id}}"),),
    ),
    Panel(
        "Second tries, hung processes",
        23,
        "Requests that a second replica took over, and processes that were killed as hung.",
        (
            (per_second("flux_retries", "tier"), "{{tier}} second tries"),
            (per_second("flux_hung_replicas", "process", ""), "{{process}} hung"),
        ),
    ),
    Panel(
        "Seconds of the controller's loop",
        24,
        "Serve's controller starts and ends replicas; when it is slow, all of that is.",
        (("max (ray_serve_controller_control_loop_duration_s)", "loop"),),
        "s",
    ),
    Panel(
        "Ledger",
        28,
        "Round trip, and the gateways that do not hear it.",
        (
            (quantile(0.5, "flux_ledger_round_trip_seconds", "", ""), "p50"),
            (quantile(0.99, "flux_ledger_round_trip_seconds", "", ""), "p99"),
            ("count (ray_flux_ledger_reachable == 0) or vector(0)", "gateways without it"),
        ),
    ),
    Panel(
        "Prompts to upsample",
        37,
        "A second, by what became of them; late, busy, failed, skipped: used as they were sent.",
        (
            (per_second("flux_upsampled_prompts", "outcome"), "{{outcome}}"),
            (quantile(0.95, "flux_upsampling_seconds"), "{{tier}} seconds, p95"),
        ),
    ),
    Panel(
        "Memory of gateways",
        29,
        "Share of what a gateway may hold; at 1 requests are refused.",
        (
            (
                "max by (application, replica) (ray_flux_held_bytes) / "
                "max by (application, replica) (ray_flux_max_held_bytes)",
                "{{application}} {{replica}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "Oldest job, webhooks",
        30,
        "Seconds that the oldest job has waited, and webhooks that are due or given up.",
        (
            (latest("flux_oldest_job_seconds"), "{{tier}} seconds"),
            (latest("flux_webhooks", "state", 'state=~"due|given up"'), "webhooks {{state}}"),
        ),
    ),
    Panel(
        "Replicas started",
        31,
        "In the last ten minutes. More than a deploy explains are crashes.",
        (
            (
                "count by (application) (ray_serve_deployment_replica_starts_total unless "
                "ray_serve_deployment_replica_starts_total offset 10m)",
                "{{application}}",
            ),
        ),
    ),
    Panel(
        "State of applications",
        32,
        "6 running, 5 deploying, 2 unhealthy, 1 failed to deploy.",
        (("max by (application) (ray_serve_application_status)", "{{application}}"),),
    ),
    Panel(
        "Memory of processes",
        33,
        "Resident megabytes of the largest kinds of process; ranks are RankActor.",
        (("topk(8, sum by (Component) (ray_component_rss_mb))", "{{Component}}"),),
        "decmbytes",
    ),
    Panel(
        "Memory of GPUs",
        34,
        "Used megabytes, by node and GPU.",
        (("max by (instance, GpuIndex) (ray_node_gram_used)", "{{instance}} {{GpuIndex}}"),),
        "decmbytes",
    ),
    Panel(
        "GPUs at work",
        35,
        "Share of the time in which a kernel ran.",
        (
            (
                "max by (instance, GpuIndex) (ray_node_gpus_utilization) / 100",
                "{{instance}} {{GpuIndex}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "What runs",
        36,
        "Replicas by version, precision of the weights, and GPU.",
        ((f"count by (tier, version, quantization, card) (ray_flux_build_info{{{TIER}}})", ""),),
        kind="table",
    ),
)
ROWS = (
    ("Are we keeping the promise?", PROMISE),
    ("Where does the time go?", TIME),
    ("What will scale next?", SCALE),
    ("Who uses it?", USERS),
    ("When something is wrong", WRONG),
)


def all_panels() -> Iterator[Panel]:
    """Yield the panels of all rows, in their order."""
    for _, panels in ROWS:
        yield from panels
