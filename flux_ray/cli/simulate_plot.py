"""Plot a simulation over time: for each tier its demand, its replicas, and the waiting work."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flux_ray.simulator.outcome import Outcome, TierOutcome

FORMATS = (".svg", ".png")
MAX_HOURS_IN_MINUTES = 3.0
# Okabe and Ito's colours, which colour-blind people can tell apart.
DEMAND, REPLICAS, STARTING, WAITING = "#E69F00", "#0072B2", "#56B4E9", "#D55E00"


def save_plot(outcome: "Outcome", path: Path) -> None:
    """Write the plot to a file; ValueError if its ending is none of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path} must end in one of: {', '.join(FORMATS)}")
    num_tiers = max(1, len(outcome.tiers))
    figure = Figure(figsize=(11, 3.6 * num_tiers + 0.4), layout="constrained")
    grid = figure.subplots(
        2 * num_tiers, 1, sharex=True, squeeze=False, height_ratios=[2, 1] * num_tiers
    )
    in_minutes = outcome.end_s <= MAX_HOURS_IN_MINUTES * 3600
    for number, (name, tier) in enumerate(outcome.tiers.items()):
        plot_load(grid[2 * number][0], name, tier, 60 if in_minutes else 3600)
        plot_waiting(grid[2 * number + 1][0], tier, 60 if in_minutes else 3600)
    # One legend above all tiers: inside a plot it could hide a peak.
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=9, ncols=3, frameon=False)
    grid[-1][0].set_xlabel("minutes" if in_minutes else "hours")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_load(axes: "Axes", name: str, tier: "TierOutcome", unit_s: float) -> None:
    """Plot the work that arrives per second, and the replicas that are there for it."""
    edges = edges_of(tier, unit_s)
    replicas = [point.replicas for point in tier.points]
    held = [point.replicas + point.starting for point in tier.points]
    demand = [point.demand for point in tier.points]
    axes.stairs(
        demand, edges, fill=True, color=DEMAND, alpha=0.45, label="demand: work that arrives"
    )
    axes.stairs(held, edges, color=STARTING, linewidth=1.2, label="replicas, starting ones too")
    axes.stairs(replicas, edges, color=REPLICAS, linewidth=1.8, label="replicas that are up")
    axes.set_title(title_of(name, tier), loc="left", fontsize=11)
    axes.set_ylabel("replicas")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def plot_waiting(axes: "Axes", tier: "TierOutcome", unit_s: float) -> None:
    """Plot the waiting work, as the seconds that it would keep each replica busy."""
    shares = [point.waiting_s / max(point.replicas, 1.0) for point in tier.points]
    axes.stairs(shares, edges_of(tier, unit_s), fill=True, color=WAITING, alpha=0.6)
    axes.set_ylabel("waiting,\ns a replica")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def edges_of(tier: "TierOutcome", unit_s: float) -> list[float]:
    """Return the time at which each point begins, and the time at which the last one ends."""
    if not tier.points:
        return [0.0]
    last = tier.points[-1]
    return [*(point.at_s / unit_s for point in tier.points), (last.at_s + last.length_s) / unit_s]


def title_of(name: str, tier: "TierOutcome") -> str:
    """Return a tier's outcome in one line."""
    return (
        f"{name}: {100 * tier.attainment:.1f} % in time of {tier.num_arrived:,} requests,"
        f" {tier.num_refused:,} refused, p95 wait {tier.waits.quantile(0.95):.1f} s,"
        f" {tier.gpu_hours:,.1f} GPU hours"
    )
