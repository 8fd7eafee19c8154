"""A simulation's outcome for people, as a table, and for programs, as plain values."""

from typing import Any

from rich.console import Console
from rich.table import Table

from flux_ray.simulator.outcome import Outcome, TierOutcome

COLUMNS = ("requests", "SLO met", "by GPU s", "p50 s", "p95 s", "p99 s", "late", "refused", "lost")
QUANTILES = (0.5, 0.95, 0.99)
NOTES = (
    "SLO met: done by the deadline; a refused request has missed it. p50, p95, p99: seconds until a"
    " replica began. GPU hours: all that replicas held, cold starts included, but not the card of a"
    " text encoder that they share."
)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """A row for each tier, and one for all of them."""
    table = Table("tier")
    for column in (*COLUMNS, "GPU hours", "replicas"):
        table.add_column(column, justify="right")
    for name, tier in outcome.tiers.items():
        waits = [f"{tier.waits.quantile(share):.2f}" for share in QUANTILES]
        table.add_row(name, *row_of(tier, waits), replicas_of(tier))
    table.add_section()
    table.add_row("all", *row_of(outcome.total, ["", "", ""]), "")
    console.print(table)
    console.print(NOTES, markup=False, highlight=False)


def row_of(tier: TierOutcome, waits: list[str]) -> list[str]:
    """The counts of a tier, or of all."""
    return [
        f"{tier.num_arrived:,}",
        f"{100 * tier.attainment:.1f} %",
        f"{100 * tier.attainment_by_gpu_seconds:.1f} %",
        *waits,
        f"{tier.num_late:,}",
        f"{tier.num_refused:,}",
        f"{tier.num_lost:,}",
        f"{tier.gpu_hours:,.1f}",
    ]


def replicas_of(tier: TierOutcome) -> str:
    """The least and the most that were up, as means over the curve's points."""
    least, most = bounds_of([point.replicas for point in tier.points])
    return f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"


def bounds_of(values: list[float]) -> tuple[float, float]:
    """The least and the most; 0 and 0 of nothing."""
    return min(values, default=0.0), max(values, default=0.0)


def report_of(outcome: Outcome) -> dict[str, Any]:
    """Plain values: `tiers` by name, and the same counts of `all`."""
    return {
        "end_s": outcome.end_s,
        "all": counts_of(outcome.total),
        "tiers": {
            name: counts_of(tier) | {"wait_s": waits_of(tier)}
            for name, tier in outcome.tiers.items()
        },
    }


def counts_of(tier: TierOutcome) -> dict[str, Any]:
    """What can be added up over tiers, and the two shares."""
    return {
        "arrived": tier.num_arrived,
        "met": tier.num_met,
        "late": tier.num_late,
        "refused": tier.num_refused,
        "lost": tier.num_lost,
        "slo_attainment": tier.attainment,
        "slo_attainment_by_gpu_seconds": tier.attainment_by_gpu_seconds,
        "gpu_hours": tier.gpu_hours,
    }


def waits_of(tier: TierOutcome) -> dict[str, float]:
    """Quantiles and mean, in seconds."""
    quantiles = {f"p{share * 100:.0f}": tier.waits.quantile(share) for share in QUANTILES}
    return quantiles | {"mean": tier.waits.mean_s}
