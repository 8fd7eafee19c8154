"""Metrics that say what they seem to say."""

from collections import Counter
from itertools import pairwise

import pytest

from flux_ray import metrics
from flux_ray.metrics import Metric
from flux_ray.replica import leader as replica_meter
from flux_ray.replica.leader import ReplicaMetrics
from flux_ray.router import metrics as bill_module
from flux_ray.router.metrics import RouterMetrics

METRICS = [each for each in vars(metrics).values() if isinstance(each, Metric)]


class Counted:
    """Ray's counter or histogram: it takes no label but its own, and adds up."""

    def __init__(self, metric: Metric, sums: Counter[str]) -> None:
        self.metric = metric
        self.sums = sums

    def inc(self, value: float, labels: dict[str, str]) -> None:
        assert value > 0, "Ray raises"
        assert labels.keys() == set(self.metric.labels)
        self.sums[" ".join([self.metric.name, *labels.values()])] += value  # type: ignore[assignment]

    def observe(self, value: float, labels: dict[str, str]) -> None:
        assert labels.keys() == set(self.metric.labels)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    sums: Counter[str] = Counter()
    for module in (replica_meter, bill_module):
        for name in ("counter", "histogram"):
            monkeypatch.setattr(module, name, lambda metric: Counted(metric, sums))
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
        bill.spend("tiny", 2 * seconds)
    assert sums == {"flux_queue_spent_seconds tiny": 3.5, "flux_gpu_spent_seconds tiny": 7.0}
