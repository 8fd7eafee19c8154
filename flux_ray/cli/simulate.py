"""`flux-ray simulate`: a fleet through a trace, with the policies that the cluster runs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from flux_ray.cli.client import fail
from flux_ray.cli.serve_config import tiers_in
from flux_ray.cli.simulate_table import print_outcome, report_of
from flux_ray.cli.terminal import table_console
from flux_ray.router.trace import TracedRequest
from flux_ray.simulator.arrivals import Pattern
from flux_ray.simulator.fleet import FleetPlan, Overrides, TierModel, run_fleet, tier_model
from flux_ray.simulator.outcome import Outcome
from flux_ray.simulator.traces import from_zero, last_arrival_s, read_trace
from flux_ray.simulator.traffic import Traffic, generate

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

Config = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="serve/*.yaml")]
TraceName = Annotated[str, typer.Option(help=f"{', '.join(PATTERNS)}, or a file of JSON lines.")]
Gpu = Annotated[str, typer.Option(help="The kind of card.")]
Load = Annotated[float, typer.Option(min=0.0, help="Work that comes, over what CONFIG can do.")]
Hours = Annotated[float, typer.Option(min=0.001, help="Of a generated trace.")]
Seed = Annotated[int, typer.Option(help="The same one gives the same outcome.")]
SloScale = Annotated[float, typer.Option(min=1.0, help="Deadlines, where not said, in costs.")]
Least = Annotated[int | None, typer.Option(min=0, help="Scale tiers down to that many.")]
Most = Annotated[int | None, typer.Option(min=1, help="Scale tiers up to that many.")]
Gpus = Annotated[
    int | None, typer.Option(min=1, help="What tiers that scale share; else CONFIG's.")
]
ColdStart = Annotated[
    float | None, typer.Option(min=0.0, help="Else CONFIG's, or 20 s for a card, 60 s for a group.")
]
Failures = Annotated[float, typer.Option(min=0.0, help="Replicas of each tier that die an hour.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Plot = Annotated[Path | None, typer.Option(dir_okay=False, help="Where: a .svg or .png file.")]


@dataclass(frozen=True)
class Arriving:
    """The requests of a trace, and until when they come; `is_recorded` if they are from a file."""

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

    Tiers scale as CONFIG says, or as --min-replicas and --max-replicas do.
    """
    plan = FleetPlan(slo_scale, failures_per_hour, seed, gpus)
    try:
        overrides = Overrides(min_replicas, max_replicas, cold_start_s)
        models = {
            args.tier: tier_model(args, gpu, slo_scale, overrides) for args in tiers_in(config)
        }
        arriving = arriving_of(trace, models, load, hours * 3600, seed)
        with Console(stderr=True).status("simulating"):
            outcome = run_fleet(
                models,
                arriving.entries,
                plan,
                arriving.duration_s,
                until_done=arriving.is_recorded,
            )
        if plot is not None:
            draw(outcome, plot)
    except ValueError as error:
        fail(str(error))
    show(outcome, as_json)


def arriving_of(
    trace: str, models: Mapping[str, TierModel], load: float, duration_s: float, seed: int
) -> Arriving:
    """A generated trace if there is a pattern of that name, else the file's."""
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


def draw(outcome: Outcome, path: Path) -> None:
    """The picture; the command ends if matplotlib cannot write such a file."""
    # Only here: it takes a second to import, and the other commands do without.
    from flux_ray.cli.simulate_plot import save_plot

    try:
        save_plot(outcome, path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}")


def show(outcome: Outcome, as_json: bool) -> None:
    """For programs, or for people."""
    if as_json:
        typer.echo(json.dumps(report_of(outcome)))
        return
    print_outcome(outcome, table_console())
