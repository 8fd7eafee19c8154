"""Make Ray's counters, gauges and histograms of the rows in flux_ray.metrics."""

from typing import Any

from ray.serve import metrics

from flux_ray.metrics import Metric

# How often gauges are set: Ray reads them every few seconds, and forgets those that were not set
# for some twenty.
SHOW_S = 2.0


def counter(metric: Metric) -> metrics.Counter:
    """Return Ray's counter for a metric without buckets."""
    # Any: Ray's annotation allows only a tuple of one.
    labels: Any = metric.labels
    return metrics.Counter(metric.name, metric.description, tag_keys=labels)


def add(total: metrics.Counter, seconds: float, labels: dict[str, str]) -> None:
    """Add seconds to a counter; Ray's raise for none at all, which a coarse clock may measure."""
    if seconds > 0:
        total.inc(seconds, labels)


def gauge(metric: Metric) -> metrics.Gauge:
    """Return Ray's gauge for a metric that is one; set it every `SHOW_S`, or it is forgotten."""
    labels: Any = metric.labels
    return metrics.Gauge(metric.name, metric.description, tag_keys=labels)


def histogram(metric: Metric) -> metrics.Histogram:
    """Return Ray's histogram for a metric with buckets."""
    labels: Any = metric.labels
    return metrics.Histogram(
        metric.name, metric.description, boundaries=list(metric.buckets), tag_keys=labels
    )
