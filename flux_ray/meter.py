"""The rows of flux_ray.metrics as Ray's counters and histograms."""

from typing import Any

from ray.serve import metrics

from flux_ray.metrics import Metric


def counter(metric: Metric) -> metrics.Counter:
    """Ray's counter for a row."""
    # Ray's annotation says a tuple of one.
    labels: Any = metric.labels
    return metrics.Counter(metric.name, metric.description, tag_keys=labels)


def histogram(metric: Metric) -> metrics.Histogram:
    """Ray's histogram for a row."""
    labels: Any = metric.labels
    return metrics.Histogram(
        metric.name, metric.description, boundaries=list(metric.buckets), tag_keys=labels
    )
