"""Metrics that say what they seem to say."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

import flux_ray
from flux_ray import metrics
from flux_ray.errors import Overloaded
from flux_ray.gateway.memory_budget import MemoryBudget
from flux_ray.metrics import Metric
from flux_ray.replica import leader as replica_meter
from flux_ray.replica.leader import ReplicaMetrics
from flux_ray.request import ImageRequest
from flux_ray.router import metrics as bill_module
from flux_ray.router.autoscaling.policy import ScalingGauges
from flux_ray.router.autoscaling.scaler import (
    SLACK_REPLICAS,
    Scaler,
    ScalingRules,
    ScalingState,
)
from flux_ray.router.ledger import actor as queue_meter
from flux_ray.router.ledger.actor import QueueGauges
from flux_ray.router.ledger.ledger import Ledger
from flux_ray.router.ledger.messages import GatewayReport, SubmitRequest
from flux_ray.router.metrics import GatewayGauges, JobGauges, RouterMetrics
from flux_ray.router.queue import TierQueue

METRICS = [each for each in vars(metrics).values() if isinstance(each, Metric)]


class Counted:
    """Ray's counter, gauge or histogram: it takes no label but its own, and adds up or keeps."""

    def __init__(self, metric: Metric, sums: Counter[str]) -> None:
        self.metric = metric
        self.sums = sums

    def inc(self, value: float, labels: dict[str, str]) -> None:
        assert value > 0, "Ray raises"
        assert labels.keys() == set(self.metric.labels)
        self.sums[" ".join([self.metric.name, *labels.values()])] += value  # type: ignore[assignment]

    def observe(self, value: float, labels: dict[str, str]) -> None:
        assert self.metric.buckets
        assert labels.keys() == set(self.metric.labels)

    def set(self, value: float, labels: dict[str, str]) -> None:
        assert self.metric.is_gauge
        assert labels.keys() == set(self.metric.labels)
        self.sums[" ".join([self.metric.name, *labels.values()])] = value  # type: ignore[assignment]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    sums: Counter[str] = Counter()
    # Not those of `policy`: a policy that was unpickled in this process gives its classes others.
    of_policy = ScalingGauges.__init__.__globals__
    for names in (vars(replica_meter), vars(bill_module), vars(queue_meter), of_policy):
        for name in {"counter", "gauge", "histogram"} & names.keys():
            monkeypatch.setitem(names, name, lambda metric: Counted(metric, sums))
    return sums


def test_each_metric_has_a_name_of_its_own() -> None:
    names = [each.name for each in METRICS]
    assert len(set(names)) == len(names)


def test_a_bucket_of_seconds_is_at_most_twice_as_long_as_the_one_before() -> None:
    assert all(1.3 < after / before <= 2 for before, after in pairwise(metrics.SECONDS))
    assert metrics.SECONDS[-1] == 600, "as long as a gateway waits for a request"


def test_seconds_of_stages_are_added_up(sums: Counter[str]) -> None:
    meter = ReplicaMetrics("tiny")
    for stage, seconds in (("denoise", 0.2), ("denoise", 0.3), ("decode", 1.0), ("decode", 0.0)):
        meter.observe_stage(stage, seconds)
    assert sums == {
        "flux_stage_spent_seconds tiny denoise": pytest.approx(0.5),
        "flux_stage_spent_seconds tiny decode": pytest.approx(1.0),
    }


def test_seconds_of_waiting_and_of_cards_are_added_up(sums: Counter[str]) -> None:
    bill = RouterMetrics()
    for seconds in (0.0, 1.5, 2.0):
        bill.wait("tiny", seconds)
        bill.spend("tiny", 2 * seconds, "gold")
    assert sums == {"flux_queue_spent_seconds tiny": 3.5, "flux_gpu_spent_seconds tiny gold": 7.0}


def test_requests_are_counted_by_what_became_of_them(sums: Counter[str]) -> None:
    bill = RouterMetrics()
    bill.settle("tiny", "gold", is_kept=True)
    bill.settle("tiny", "gold", is_kept=False)
    bill.refuse("tiny", "overloaded")
    bill.retry("tiny")
    bill.hear(0.002)
    assert sums == {
        "flux_promises tiny gold kept": 1,
        "flux_promises tiny gold missed": 1,
        "flux_refused tiny overloaded": 1,
        "flux_retries tiny": 1,
    }


def test_prompts_are_counted_by_what_became_of_them(sums: Counter[str]) -> None:
    bill = RouterMetrics()
    for outcome in ("done", "cached", "done", "skipped", "late"):
        bill.upsample("tiny", "gold", outcome, 0.0)
    assert sums == {
        "flux_upsampled_prompts tiny gold done": 2,
        "flux_upsampled_prompts tiny gold cached": 1,
        "flux_upsampled_prompts tiny gold skipped": 1,
        "flux_upsampled_prompts tiny gold late": 1,
    }


def test_a_replica_shows_what_it_is_and_counts_what_it_was_given(sums: Counter[str]) -> None:
    meter = ReplicaMetrics("tiny")
    meter.show(12.5, "fp8", "h100-80gb")
    for is_cached in (True, False, False):
        meter.look_up(asked_for(width=1000, height=500, num_images=2), is_cached=is_cached)
    assert sums == {
        "flux_load_seconds tiny": 12.5,
        f"flux_build_info tiny {flux_ray.__version__} fp8 h100-80gb": 1,
        "flux_megapixels tiny": pytest.approx(3.0),
        "flux_cache_lookups tiny hit": 1,
        "flux_cache_lookups tiny miss": 2,
    }


def asked_for(**fields: Any) -> ImageRequest:
    words = {"request_id": "r", "tier": "tiny", "prompt": "p", "num_steps": 4, "guidance": 1.0}
    return ImageRequest(**words, seed=1, **fields)


def test_a_gateway_counts_each_refusal_for_want_of_memory_once(sums: Counter[str]) -> None:
    budget = MemoryBudget()
    gauges = GatewayGauges(
        RouterMetrics(),
        100,
        held_bytes=lambda: budget.num_bytes,
        num_refused=lambda: budget.num_refused,
        hears_ledger=lambda: False,
        replica_gpus=lambda: {"tiny": 2.0},
    )
    held = budget.share(100)
    held.grow(80)
    for refused in (lambda: held.grow(30), lambda: budget.check_room(30, 100)):
        with pytest.raises(Overloaded):
            refused()
        gauges.show()
    gauges.show()
    assert sums == {
        "flux_held_bytes": 80,
        "flux_max_held_bytes": 100,
        "flux_ledger_reachable": 0,
        "flux_replica_gpus tiny": 2.0,
        "flux_refused unknown memory": 2,
    }


def test_jobs_that_are_gone_are_shown_as_none(sums: Counter[str]) -> None:
    gauges = JobGauges()
    gauges.show({("tiny", "pending"): 3, ("tiny", "ready"): 1}, {"tiny": 40.0}, {"due": 2})
    gauges.show({("tiny", "ready"): 4}, {}, {})
    assert sums == {
        "flux_jobs_by_state tiny pending": 0,
        "flux_jobs_by_state tiny running": 0,
        "flux_jobs_by_state tiny ready": 4,
        "flux_oldest_job_seconds tiny": 0,
        "flux_webhooks due": 0,
        "flux_webhooks given up": 0,
    }


def test_the_queues_of_all_tiers_are_shown(sums: Counter[str]) -> None:
    ledger = Ledger(TierQueue)
    gauges = QueueGauges()
    submissions = tuple(SubmitRequest(str(number), "tiny", 2.0, 60.0) for number in range(3))
    ledger.hear("gateway", GatewayReport(submissions), 0.0)
    gauges.show(ledger, 0.0)
    assert sums == {"flux_queued_requests tiny": 3, "flux_queued_replica_seconds tiny": 6.0}


def test_a_tier_shows_why_it_wants_replicas(sums: Counter[str]) -> None:
    scaler = Scaler(ScalingRules(target_wait_s=5.0, cold_start_s=15.0))
    for now in (0.0, 10.0):
        wanted = scaler.replicas(ScalingState(now, 1, 0, 100.0, 0.0, 20.0, 0, 9))
    ScalingGauges("tiny").show(wanted, scaler.causes, 10.0)
    needed = [sums[f"flux_needed_replicas tiny {cause}"] for cause in scaler.causes]
    assert needed[0] == pytest.approx(2.0), "20 replica seconds in 10 seconds"
    assert needed[2] == pytest.approx(100 / 20), "within the wait and a cold start"
    assert wanted - 1 < sum(needed) - SLACK_REPLICAS <= wanted == sums["flux_wanted_replicas tiny"]
