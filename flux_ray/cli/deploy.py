"""`flux-ray deploy`: check a config, say what it changes, deploy it, and wait until it serves.

`serve deploy` says "success" when Serve has taken the config, whatever becomes of it. This command
ends with status 0 only when all applications run, and else with one sentence that says why not.
"""

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flux_ray.catalog import CARDS
from flux_ray.cli.client import fail, table_console, warn
from flux_ray.cli.config_file import ConfigFile, check_config, report
from flux_ray.cli.dashboard import (
    DEFAULT_ADDRESS,
    Address,
    Dashboard,
    DashboardError,
    TokenFile,
    dashboard_at,
    is_local,
)
from flux_ray.cli.deployment import (
    FAILED,
    RUNNING,
    UNHEALTHY,
    AppProgress,
    Change,
    changes,
    failure_text,
    fixed_options,
    progress,
    stuck_applications,
    waiting_text,
)
from flux_ray.cli.plan import count_bytes, verdict_of
from flux_ray.config import (
    ClusterNode,
    check_jobs,
    check_own_addresses,
    check_paths,
    check_room,
    least_gpus,
)

POLL_S = 1.0
# Serve notes a config at once, but an application that it already runs looks done until it has
# begun to work on it.
SETTLE_S = 3.0
# Without --timeout: at least so long, and so much longer than the weights of any tier may take.
LEAST_TIMEOUT_S, AFTER_LOADING_S = 1800.0, 300.0
COLORS = {RUNNING: "green", FAILED: "red", UNHEALTHY: "red"}
KIND_COLORS = {"new": "green", "changed": "yellow", "removed": "red", "unchanged": "dim"}

Gpu = Annotated[
    str | None,
    typer.Option(help="The kind of GPU to plan for; by default what the cluster says it has."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and say what would change; change nothing.")
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="End when Serve has taken the config, as it may be wrong.")
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=1,
        help="Seconds to wait until all applications run; by default 1800, or 300 more than the"
        " longest load_timeout_s of CONFIG.",
    ),
]
Remove = Annotated[
    bool, typer.Option("--remove", help="Remove running applications that CONFIG does not have.")
]
MayGrow = Annotated[
    bool,
    typer.Option("--may-grow", help="Nodes come later: too few of them are only a warning."),
]
AllowOthers = Annotated[
    bool,
    typer.Option("--allow-others", help="Take applications that are not flux-ray's, unchecked."),
]


def deploy(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="serve/*.yaml")],
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    timeout_s: Timeout = None,
    remove: Remove = False,
    gpu: Gpu = None,
    may_grow: MayGrow = False,
    allow_others: AllowOthers = False,
) -> None:
    """Check CONFIG, say what it changes, give it to a running cluster, and wait until all serves.

    Nothing is changed if a check fails. Exit status: 0 if all applications run, 1 if a check or an
    application failed or the time was over, 2 for wrong options.

    Example: flux-ray deploy serve/node-8gpu.yaml --dry-run
    """
    file = check_config(config, allow_others=allow_others)
    timeout_s = timeout_s or longest_start_s(file)
    try:
        with dashboard_at(address, token_file) as dashboard:
            before = dashboard.details()
            check_places(file, dashboard, address, may_grow=may_grow)
            check_cluster(file, dashboard, before, gpu, may_grow=may_grow)
            planned = changes(file.config, before)
            say_changes(planned)
            check_removals(config, planned, remove=remove)
            if dry_run:
                typer.echo("dry run: nothing was changed")
                return
            free_stuck(dashboard, file.config, stuck_applications(planned, before), timeout_s)
            dashboard.put(file.config)
            if no_wait:
                typer.echo("Serve has taken the config; `flux-ray status` shows what becomes of it")
            else:
                wait(dashboard, planned, timeout_s, before)
    except DashboardError as error:
        fail(str(error))


def longest_start_s(file: ConfigFile) -> float:
    """Return how long to wait for all applications of a file, if nobody says it."""
    loads_s = [args.load_timeout_s + AFTER_LOADING_S for args in file.tiers]
    return max([LEAST_TIMEOUT_S, *loads_s])


def check_places(file: ConfigFile, dashboard: Dashboard, address: str, *, may_grow: bool) -> None:
    """End the command if addresses or paths are wrong; paths of other machines are warned of."""
    nodes = dashboard.nodes()
    # A head without processors has no part of the file on it, though it may be the only node yet.
    is_lone = len(nodes) == 1 and nodes[0].num_cpus > 0
    is_here = is_local(address) and is_lone and not may_grow
    own = check_own_addresses(file.applications)
    report(file.path, [*own, *check_paths(file.applications, is_here)])


def free_stuck(
    dashboard: Dashboard, config: dict[str, Any], stuck: set[str], timeout_s: float
) -> None:
    """Have Serve forget applications that it has given up, so that it tries to start them again."""
    if not stuck:
        return
    typer.echo(f"{', '.join(sorted(stuck))}: failed before, started again")
    others = [each for each in config["applications"] if each["name"] not in stuck]
    dashboard.put({**config, "applications": others})
    end_s = time.monotonic() + timeout_s
    while stuck & dashboard.details()["applications"].keys():
        if time.monotonic() > end_s:
            fail(f"{', '.join(sorted(stuck))}: Serve does not end what is left of it")
        time.sleep(POLL_S)


def check_cluster(
    file: ConfigFile,
    dashboard: Dashboard,
    before: dict[str, Any],
    gpu: str | None,
    *,
    may_grow: bool,
) -> None:
    """End the command if the file does not suit the nodes; warn of what else differs."""
    compare_versions(dashboard.versions().ray)
    nodes = dashboard.nodes()
    found = [
        *check_room(file.applications, nodes, may_grow=may_grow),
        *check_jobs(file.applications, nodes, may_grow=may_grow),
        *fixed_options(file.config, before),
    ]
    report(file.path, found)
    check_memory(file, gpu or card_among(nodes))


def compare_versions(running: str) -> None:
    """Warn if the cluster runs another version of Ray than this machine has."""
    own = importlib.metadata.version("ray")
    if running != own:
        warn(
            f"the cluster runs Ray {running} and this machine has {own}: what was checked here may"
            " be different there; deploy from a machine with the same versions"
        )


def card_among(nodes: list[ClusterNode]) -> str | None:
    """Return the one kind of GPU of the catalogue that the nodes have, or None if that is open."""
    kinds = {node.accelerator for node in nodes if node.num_gpus}
    names = {name for kind in kinds for name in CARDS if kind and is_kind(name, kind)}
    return names.pop() if len(kinds) == len(names) == 1 else None


def is_kind(name: str, accelerator: str) -> bool:
    """Return whether a GPU of the catalogue is what Ray calls by that word, such as `H100`."""
    words = accelerator.lower().removeprefix("nvidia-").split("-")
    chip, _, memory = name.partition("-")
    return chip == words[0] and all(memory.startswith(word.rstrip("b")) for word in words[1:])


def check_memory(file: ConfigFile, card: str | None) -> None:
    """End the command if a tier needs more memory than its GPUs have; say if that is not known."""
    tiers = [args for args in file.tiers if least_gpus(args)]
    if not tiers:
        return
    if card is None:
        warn(
            f"{file.path}: the kind of GPU is not known, so memory was not planned; name it with"
            " --gpu"
        )
        return
    with Console(stderr=True).status("counting bytes"):
        plan = count_bytes(tiers, card, max(1, sum(map(least_gpus, tiers))))
    for tier in plan.tiers:
        for planned in tier.cards:
            if not planned.fits:
                fail(
                    f"{file.path}: application {tier.tier}: {verdict_of(planned)} on {card}:"
                    f" {planned.total_bytes / 1e9:.1f} GB of {plan.card.usable_bytes / 1e9:.1f};"
                    f" `flux-ray plan {file.path} --gpu {card}` says which layouts fit"
                )


def say_changes(planned: list[Change]) -> None:
    """Print what the deployment does to each application."""
    table = Table("application", "change", "keys")
    for change in planned:
        kind = Text(change.kind, KIND_COLORS[change.kind])
        table.add_row(Text(change.name), kind, Text(", ".join(change.keys)))
    console = table_console()
    if console.is_terminal:
        console.print(table)
        return
    for change in planned:
        typer.echo(f"{change.name}: {change.text}")


def check_removals(path: Path, planned: list[Change], *, remove: bool) -> None:
    """End the command if applications would be removed and nobody has said so."""
    gone = [change.name for change in planned if change.kind == "removed"]
    if gone and not remove:
        fail(
            f"{path}: applications: {', '.join(gone)} would be removed, as the file does not have"
            f" {'it' if len(gone) == 1 else 'them'}; add to the file what is to stay, or say"
            " --remove"
        )


def wait(
    dashboard: Dashboard, planned: list[Change], timeout_s: float, before: dict[str, Any]
) -> None:
    """Show the applications until all run; end the command if one fails or the time is over."""
    names = [change.name for change in planned if change.kind != "removed"]
    started_s = time.monotonic()
    console = table_console()
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
    shown: dict[str, str] = {}
    details = before
    rows = progress(names, details)
    with live or nullcontext():
        while time.monotonic() - started_s < timeout_s:
            # The controller may be away for a moment; then what it said last holds.
            with suppress(DashboardError):
                details = dashboard.details()
                rows = progress(names, details)
            if live is None:
                for line in news(rows, shown):
                    typer.echo(line)
            else:
                live.update(table_of(rows))
            if time.monotonic() - started_s > SETTLE_S and is_settled(rows):
                break
            time.sleep(POLL_S)
    finish(rows, details, before, timeout_s, time.monotonic() - started_s)


def is_settled(rows: list[AppProgress]) -> bool:
    """Return whether all applications run, or one has failed, which no patience mends."""
    return any(row.status == FAILED for row in rows) or all(row.is_done for row in rows)


def finish(
    rows: list[AppProgress],
    details: dict[str, Any],
    before: dict[str, Any],
    timeout_s: float,
    taken_s: float,
) -> None:
    """Say that all runs, or end the command with the sentence that says why not."""
    if any(row.status in (FAILED, UNHEALTHY) for row in rows):
        fail(failure_text(rows, details, before))
    if not all(row.status == RUNNING for row in rows):
        fail(waiting_text(rows, timeout_s))
    typer.echo(f"all applications run, after {taken_s:.0f} s")


def news(rows: list[AppProgress], shown: dict[str, str]) -> Iterator[str]:
    """Yield a line for each application whose state is not what was shown last."""
    for row in rows:
        if shown.get(row.name) != row.text:
            shown[row.name] = row.text
            yield f"{row.name}: {row.text}"


def table_of(rows: list[AppProgress]) -> Table:
    """Return the table of a terminal."""
    table = Table("application", "state", "replicas", "")
    for row in rows:
        state = Text(row.status.lower().replace("_", " "), COLORS.get(row.status, "yellow"))
        replicas = f"{row.num_running} of {row.num_wanted}" if row.num_wanted else "-"
        table.add_row(Text(row.name), state, replicas, Text(row.message))
    return table
