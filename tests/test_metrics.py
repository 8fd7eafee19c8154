"""Metrics that say what they seem to say."""

from itertools import pairwise

from flux_ray import metrics
from flux_ray.metrics import Metric

METRICS = [each for each in vars(metrics).values() if isinstance(each, Metric)]


def test_each_metric_has_a_name_of_its_own() -> None:
    names = [each.name for each in METRICS]
    assert len(set(names)) == len(names)


def test_a_bucket_of_seconds_is_at_most_twice_as_long_as_the_one_before() -> None:
    assert all(1.3 < after / before <= 2 for before, after in pairwise(metrics.SECONDS))
    assert metrics.SECONDS[-1] == 600, "as long as a gateway waits for a request"
