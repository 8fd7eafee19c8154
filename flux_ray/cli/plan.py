"""`flux-ray plan`: check that a deployment fits its GPUs, before anything of it is started.

The plan is printed as a table of GPUs, with the cheapest layouts and notes on how to read the
numbers, or as JSON.
"""

import json
import logging
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flux_ray.cli.client import fail, plural, table_console
from flux_ray.cli.config_file import tiers_in
from flux_ray.config import TierArgs

if TYPE_CHECKING:
    from flux_ray.planner.plan import GpuPlan, PlacementOption, Plan, TierPlan

GB = 10**9
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
# The share of whole parameters from which on a plan says so. Of FLUX.2 it is a fortieth.
WORTH_SAYING = 0.1
COLUMNS = ("transf.", "encoder", "VAE", "activ.", "comm.", "runtime", "total", "card", "default")
NOTES = """\
GB = 10^9 bytes. Weights are counted from the model's shapes, to the byte. Activations are those of
the largest request that the tier allows (`default`: the total at its default size, without
references): tensors alive at once, within 10 % of what the same code allocates on the meta device,
and what waiting requests hold. Assumed: attention that does not keep its scores (where no fused
kernel takes the VAE's 512 channels it does: 0.3 more), decoding in tiles above a megapixel, 0.8 for
CUDA, 0.7 for NCCL and each set of GPUs."""


def print_plan(plan: "Plan", console: Console) -> None:
    """Print a plan: the table, the layouts, the verdict and the notes.

    In a narrow terminal the terminal has to wrap the table, because rich would cut off numbers.
    """
    card, table = plan.card, table_of(plan)
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, crop=False)
    for tier in plan.tiers:
        if tier.device == "cuda":
            say(console, *layout_lines(tier))
    needed = f"{plural(plan.num_gpus, 'GPU')} needed, {plan.count} x {card.name} given"
    verdict = "all fits" if plan.fits else "it does not fit"
    say(console, "", f"{needed}, of {gb(card.usable_bytes)} usable each: {verdict}.")
    say(console, "", NOTES.replace("\n", " "))
    for tier in plan.tiers:
        for claim in tier.claims:
            ours = f"published {claim.published}, ours {gb(claim.our_bytes)}"
            say(console, f"{tier.tier}: {ours}: {claim.why}.")


def say(console: Console, *lines: str) -> None:
    """Print plain lines; rich would take a name in brackets for markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False)


def table_of(plan: "Plan") -> Table:
    """Return the table with a row for each kind of GPU of each tier."""
    table = Table(title=f"GB on each card, {plan.count} x {plan.card.name}", title_justify="left")
    table.add_column("tier", no_wrap=True)
    table.add_column("GPU", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for tier in plan.tiers:
        for planned in tier.cards:
            table.add_row(*row_of(plan, tier, planned))
        table.add_section()
    return table


def row_of(plan: "Plan", tier: "TierPlan", planned: "GpuPlan") -> list[str]:
    """Return the cells of one GPU: components, total, the GPU's memory, total at default size."""
    on_card = tier.device == "cuda"
    return [
        f"{tier.tier}\n{precision_of(tier)}",
        place_of(tier, planned),
        *(gb(num_bytes) for num_bytes in astuple(planned.bytes)),
        gb(planned.total_bytes),
        gb(plan.card.usable_bytes) if on_card else "-",
        gb(planned.default_bytes),
        verdict_of(planned) if on_card else "no card",
    ]


def precision_of(tier: "TierPlan") -> str:
    """Return the number formats of a tier's transformer and text encoder."""
    kept = SHORT[tier.dtype]
    return f"{tier.quantization or kept} / {tier.encoder_quantization or kept}"


def place_of(tier: "TierPlan", planned: "GpuPlan") -> str:
    """Return which ranks the GPU is for, and in how many replicas."""
    if not planned.ranks:
        return "encoder\nof all replicas"
    last = planned.ranks[-1]
    ranks = f"ranks 0-{last}, each" if last else "rank 0"
    return f"{ranks}\nx {plural(tier.num_replicas, 'replica')}"


def verdict_of(planned: "GpuPlan") -> str:
    """Return in words whether all requests fit, or only those of the default size."""
    if planned.fits:
        return "fits"
    return "default only" if planned.fits_default else "does not fit"


def layout_lines(tier: "TierPlan") -> list[str]:
    """Return the lines on a tier's cheapest layout and the others worth naming."""
    lines = ["", f"{tier.tier}: cheapest layout that fits: {layout_text(tier.cheapest)}"]
    for layout in tier.alternatives:
        changed = ", ".join(f"{name}: {value}" for name, value in layout.changes.items())
        lines.append(f"  or {changed or 'without NVLink, slowly'}: {layout_text(layout)}")
    if tier.fastest is not None:
        lines.append(f"  for less latency: {layout_text(tier.fastest)}")
    return [*lines, *whole_lines(tier)]


def whole_lines(tier: "TierPlan") -> list[str]:
    """Return a line if tensor ranks are in question, and would share too few of the parameters."""
    layouts = [layout for layout in (tier.cheapest, tier.fastest) if layout is not None]
    degrees = [tier.tensor, *(layout.tensor for layout in (*layouts, *tier.alternatives))]
    if max(degrees) == 1 or tier.num_whole_parameters < WORTH_SAYING * tier.num_parameters:
        return []
    whole, every = (number / 1e9 for number in (tier.num_whole_parameters, tier.num_parameters))
    return [
        f"  tensor ranks share less than they seem to: {whole:.1f} of its {every:.1f} billion"
        " parameters are whole on each, so that twice the ranks do not halve its bytes"
    ]


def layout_text(layout: "PlacementOption | None") -> str:
    """Return a layout in words: its parallel setting, GPUs and GB."""
    if layout is None:
        return "none"
    sequence = f" x sequence {layout.sequence}" if layout.sequence > 1 else ""
    num_gpus = plural(layout.tensor * layout.sequence, "GPU")
    text = f"tensor {layout.tensor}{sequence}, {num_gpus} a replica of {gb(layout.rank_bytes)} each"
    if layout.encoder_bytes is None:
        return text
    return f"{text}, and one of {gb(layout.encoder_bytes)} for the encoder of all replicas"


def gb(num_bytes: int) -> str:
    """Return bytes as GB with two decimals, so that 7.75 can be told from 8."""
    return f"{num_bytes / GB:.2f}"


if TYPE_CHECKING:
    from flux_ray.planner.plan import Plan


ASSUMED_GPU, ASSUMED_COUNT = "h100-80gb", 8


def plan(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="serve/*.yaml")],
    gpu: Annotated[
        str | None, typer.Option(help="The kind of GPU.", show_default=ASSUMED_GPU)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many GPUs there are.", show_default=str(ASSUMED_COUNT)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, in bytes.")] = False,
) -> None:
    """Count what every GPU of CONFIG has to hold, and name the cheapest layouts that fit.

    Exit status: 0 if all fits, 1 if anything does not, or the file is wrong, 2 for wrong options.

    Example: flux-ray plan serve/node-8gpu.yaml --gpu h100-80gb --count 8
    """
    tiers = tiers_in(config, are_warnings_shown=True)
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
    """Make the plan, or end the command with the reason why there can be none."""
    # Libraries warn at import about what they lack for training, which matters to no plan.
    logging.disable(logging.WARNING)
    try:
        # Imported here only: torch takes seconds, which the other commands must not wait for.
        from flux_ray.planner.plan import make_plan

        return make_plan(tiers, gpu, count)
    except ValueError as error:
        fail(str(error))
    finally:
        logging.disable(logging.NOTSET)
