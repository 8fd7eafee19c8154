"""`flux-ray plan`: whether a deployment fits its cards, before anything of it is started."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flux_ray.cli.client import fail
from flux_ray.cli.plan_table import print_plan
from flux_ray.cli.serve_config import tiers_in
from flux_ray.cli.terminal import table_console
from flux_ray.config.tier import TierArgs

if TYPE_CHECKING:
    from flux_ray.planner.plan import Plan


ASSUMED_GPU, ASSUMED_COUNT = "h100-80gb", 8


def plan(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="serve/*.yaml")],
    gpu: Annotated[
        str | None, typer.Option(help="The kind of card.", show_default=ASSUMED_GPU)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many cards there are.", show_default=str(ASSUMED_COUNT)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, in bytes.")] = False,
) -> None:
    """Count what every GPU of CONFIG has to hold; exit status 1 if anything does not fit."""
    tiers = tiers_in(config)
    if assumed := assumptions(gpu, count):
        typer.echo(assumed, err=True)
    gpu, count = gpu or ASSUMED_GPU, count or ASSUMED_COUNT
    with Console(stderr=True).status("counting"):
        made = count_bytes(tiers, gpu, count)
    if as_json:
        typer.echo(json.dumps(asdict(made)))
    else:
        print_plan(made, table_console())
    if not made.fits:
        raise typer.Exit(1)


def assumptions(gpu: str | None, count: int | None) -> str:
    """Return a line that names the options that were assumed; empty if all were named."""
    options = [f"--gpu {ASSUMED_GPU}"] if gpu is None else []
    options += [f"--count {ASSUMED_COUNT}"] if count is None else []
    return f"assuming {' '.join(options)}" if options else ""


def count_bytes(tiers: list[TierArgs], gpu: str, count: int) -> "Plan":
    """The plan; the command ends with the reason if there can be none."""
    # They say at import what they lack for training.
    logging.disable(logging.WARNING)
    try:
        # Only here: the other commands start at once because they do without torch.
        from flux_ray.planner.plan import make_plan

        return make_plan(tiers, gpu, count)
    except ValueError as error:
        fail(str(error))
    finally:
        logging.disable(logging.NOTSET)
