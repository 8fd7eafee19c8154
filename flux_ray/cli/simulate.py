"""`flux-ray simulate`: send a trace through a simulated fleet with the cluster's own policies.

The outcome is printed as a table or as JSON, and plotted if asked for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from flux_ray.cli.client import fail, table_console
from flux_ray.cli.config_file import tiers_in
from flux_ray.router.trace import TracedRequest
from flux_ray.simulator.fleet import FleetPlan, Overrides, TierModel, run_fleet, tier_model
from flux_ray.simulator.outcome import Outcome, TierOutcome
from flux_ray.simulator.traffic import (
    Pattern,
    Traffic,
    from_zero,
    generate,
    last_arrival_s,
    read_trace,
)

COLUMNS = ("requests", "SLO met", "by GPU s", "p50 s", "p95 s", "p99 s", "late", "refused", "lost")
QUANTILES = (0.5, 0.95, 0.99)
NOTES = (
    "SLO met: done by the deadline; a refused request has missed it. p50, p95, p99: seconds until a"
    " replica began. GPU hours: all that replicas held, cold starts included, but not the card of a"
    " text encoder that they share."
)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print the outcome as a table, with a row for each tier and one for all of them."""
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
    """Return the cells of a tier, or of all tiers, from the counts to the GPU hours."""
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
    """Return the least and the most replicas that were up, as means over points of the curve."""
    least, most = bounds_of([point.replicas for point in tier.points])
    return f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"


def bounds_of(values: list[float]) -> tuple[float, float]:
    """Return the least and the largest value; 0 and 0 if there are none."""
    return min(values, default=0.0), max(values, default=0.0)


def report_of(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as plain values: `tiers` by name, and the same counts of `all`."""
    return {
        "end_s": outcome.end_s,
        "all": counts_of(outcome.total),
        "tiers": {
            name: counts_of(tier) | {"wait_s": waits_of(tier)}
            for name, tier in outcome.tiers.items()
        },
    }


def counts_of(tier: TierOutcome) -> dict[str, Any]:
    """Return the counts that can be added up over tiers, and the two attainments."""
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
    """Return the quantiles and the mean of a tier's waits, in seconds."""
    quantiles = {f"p{share * 100:.0f}": tier.waits.quantile(share) for share in QUANTILES}
    return quantiles | {"mean": tier.waits.mean_s}


PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

Config = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="serve/*.yaml")]
TraceName = Annotated[str, typer.Option(help=f"{', '.join(PATTERNS)}, or a file of JSON lines.")]
Gpu = Annotated[str, typer.Option(help="The kind of GPU.")]
Load = Annotated[
    float, typer.Option(min=0.0, help="Arriving work, as a share of what CONFIG can do.")
]
Hours = Annotated[float, typer.Option(min=0.001, help="Length of a generated trace.")]
Seed = Annotated[int, typer.Option(help="The same one gives the same outcome.")]
SloScale = Annotated[
    float, typer.Option(min=1.0, help="Deadlines, if not given, as multiples of the price.")
]
Least = Annotated[int | None, typer.Option(min=0, help="Scale tiers down to that many.")]
Most = Annotated[int | None, typer.Option(min=1, help="Scale tiers up to that many.")]
Gpus = Annotated[
    int | None, typer.Option(min=1, help="GPUs that scaling tiers share; default: CONFIG's.")
]
ColdStart = Annotated[
    float | None,
    typer.Option(min=0.0, help="Default: CONFIG's, or 20 s for one GPU, 60 s for several."),
]
Failures = Annotated[float, typer.Option(min=0.0, help="Replicas of each tier that die an hour.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Plot = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Write a plot to this .svg or .png file.")
]


@dataclass(frozen=True)
class Arriving:
    """The requests of a trace, and the seconds in which they come; recorded or generated."""

    entries: Iterator[TracedRequest]
    duration_s: float
    is_recorded: bool


def simulate(
    config: Config,
    trace: TraceName = "poisson",
    gpu: Gpu = "h100-80gb",
    load: Load = 0.8,
    hours: Hours = 1.0,
    seed: Seed = 0,
    slo_scale: SloScale = 3.0,
    min_replicas: Least = None,
    max_replicas: Most = None,
    gpus: Gpus = None,
    cold_start_s: ColdStart = None,
    failures_per_hour: Failures = 0.0,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Send a trace through the fleet of CONFIG, in simulated time and on no GPU.

    Exit status: 0, 1 if the file or the trace is wrong, 2 for wrong options.

    Example: flux-ray simulate --config serve/fleet.yaml --trace burst --load 0.6
    """
    plan = FleetPlan(slo_scale, failures_per_hour, seed, gpus)
    try:
        overrides = Overrides(min_replicas, max_replicas, cold_start_s)
        models = {
            args.tier: tier_model(args, gpu, slo_scale, overrides) for args in tiers_in(config)
        }
        arriving = arriving_of(trace, models, load, hours * 3600, seed)
        with Console(stderr=True).status("simulating"):
            entries, is_recorded = arriving.entries, arriving.is_recorded
            outcome = run_fleet(models, entries, plan, arriving.duration_s, until_done=is_recorded)
        if plot is not None:
            plot_to(outcome, plot)
    except ValueError as error:
        fail(str(error))
    show(outcome, as_json)


def arriving_of(
    trace: str, models: Mapping[str, TierModel], load: float, duration_s: float, seed: int
) -> Arriving:
    """Return the requests of the pattern of that name, or else of the file or folder."""
    for pattern in PATTERNS:
        if trace == pattern:
            traffics = [
                Traffic(tier, load * model.num_full_replicas / model.mean_cost_s, pattern)
                for tier, model in models.items()
            ]
            return Arriving(generate(traffics, duration_s, seed), duration_s, is_recorded=False)
    path = Path(trace)
    if not path.exists():
        fail(f"--trace {trace} is no file, no folder and no pattern: {', '.join(PATTERNS)}")
    return Arriving(from_zero(read_trace(path)), last_arrival_s(path), is_recorded=True)


def plot_to(outcome: Outcome, path: Path) -> None:
    """Save a plot of the outcome; end the command if the file cannot be written."""
    # Imported here only: matplotlib takes a second, which the other commands must not wait for.
    from flux_ray.cli.simulate_plot import save_plot

    try:
        save_plot(outcome, path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}")


def show(outcome: Outcome, as_json: bool) -> None:
    """Print the outcome, as JSON or as a table."""
    if as_json:
        typer.echo(json.dumps(report_of(outcome)))
        return
    print_outcome(outcome, table_console())
