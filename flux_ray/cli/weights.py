"""`flux-ray weights`: list, pull, verify and split the weights of tiers.

A tier's published weights are in the catalogue, at a pinned revision; a config file names its own.
huggingface_hub is imported by the commands that ask for something: it takes a second.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table

from flux_ray.catalog import EMBEDDED, TIERS, tier_for
from flux_ray.cli.client import fail, table_console
from flux_ray.cli.weight_targets import Target, folders_of, targets_of
from flux_ray.config import Parallel
from flux_ray.errors import UnknownTier
from flux_ray.weights.source import ALL_PARTS, WeightsUnavailable

if TYPE_CHECKING:
    from flux_ray.weights.download import DownloadPlan
    from flux_ray.weights.hub import HubFile

GB = 10**9
# Off a terminal: a line each time that so many percent more are done.
LINE_PERCENT = 10

weights = typer.Typer(
    no_args_is_help=True, help="The weights of tiers: on which machine, and whole."
)

What = Annotated[
    list[str],
    typer.Argument(metavar="WHAT...", help="Tiers, config files, or owner/name@revision."),
]
To = Annotated[
    Path | None,
    typer.Option("--to", help="Into FOLDER/TIER; else into the hub's cache.", file_okay=False),
]
Endpoint = Annotated[
    str | None, typer.Option(help="A mirror of the hub.", show_default="HF_ENDPOINT")
]
Yes = Annotated[bool, typer.Option("--accept-licence", help="Accept the licences that are shown.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, in bytes.")]


@contextmanager
def said_by(target: Target) -> Iterator[None]:
    """End the command with the sentence of a WeightsUnavailable."""
    try:
        yield
    except WeightsUnavailable as error:
        fail(f"{target.name}: {error}")


@weights.command("list")
def list_weights(
    config: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="A Serve config file; else all tiers."),
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List the weights of CONFIG's tiers, or all that are published, and whether they are here.

    The hub is asked only for the size of what is not here.

    Exit status: 0, also if weights are missing; 1 if the file is wrong; 2 for wrong options.

    Example: flux-ray weights list serve/fleet.yaml
    """
    words = (
        [str(config)] if config else [tier.name for tier in TIERS if tier.weights or tier.hub_id]
    )
    rows = [row_of(target, endpoint) for target in targets_of(words)]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row)))
        return
    table = Table("tier", "weights", "revision", "licence", "GB", "here")
    for row in rows:
        size = "-" if row.num_bytes is None else f"{row.num_bytes / GB:.2f}"
        revision, here = (row.revision or "-")[:12], "yes" if row.is_here else "no"
        cells = (row.tier, row.weights, revision, row.licence, size, here)
        table.add_row(*map(escape, cells))
    table_console().print(table)
    for problem in dict.fromkeys(row.problem for row in rows if row.problem):
        typer.secho(problem, fg="yellow", err=True)


@dataclass(frozen=True)
class WeightsRow:
    """What `list` says of the weights of a tier.

    `place`: where they are, if they are here. `num_bytes` is None if nobody tells the size;
    `problem` then says why.
    """

    tier: str
    weights: str
    revision: str | None
    licence: str
    num_bytes: int | None
    is_here: bool
    place: str | None
    problem: str | None


def row_of(target: Target, endpoint: str | None) -> WeightsRow:
    """Look for the weights on this machine, and ask the hub for their size if they are not here."""
    from flux_ray.weights.hub import asked_files, is_complete, kept_files, list_path, used_files

    source, name, problem = target.source, target.source.location, None
    num_bytes: int | None = None
    is_here = source.revision is None or is_complete(source, ALL_PARTS)
    if source.revision is None:
        files_here = (path for path in Path(name).rglob("*") if path.is_file())
        num_bytes = sum(path.stat().st_size for path in files_here)
        name = EMBEDDED if target.is_embedded else name
    else:
        try:
            files = kept_files(list_path(source)) or asked_files(source, endpoint)
            num_bytes = sum(file.num_bytes for file in used_files(files, ALL_PARTS))
        except WeightsUnavailable as error:
            problem = str(error)
    place = str(target.place()) if is_here else None
    row = (target.name, name, source.revision, target.licence)
    return WeightsRow(*row, num_bytes, is_here, place, problem)


@weights.command()
def pull(
    what: What,
    to: To = None,
    endpoint: Endpoint = None,
    accept_licence: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
) -> None:
    """Download the weights of WHAT at their pinned revision, and verify them.

    What is here already is not asked for. Files that are whole are kept if it is interrupted.

    Exit status: 0 if all are here and whole, 1 if any cannot be had, 2 for wrong options.

    Example: flux-ray weights pull serve/fleet.yaml --accept-licence
    """
    from flux_ray.weights.hub import is_complete

    missing = []
    for target in targets_of(what):
        if target.source.revision is None:
            where = "this package" if target.is_embedded else target.source.location
            typer.echo(f"{target.name}: its weights are in {where}, nothing to pull")
            continue
        check_pinned(target)
        if is_complete(target.source, ALL_PARTS, target.folder(to)):
            typer.echo(f"{target.name}: {target.place(to)} is whole already")
        else:
            missing.append(target)
    plans = [plan_of(target, to, endpoint) for target in missing]
    check_room_for_all(missing, plans, to)
    if dry_run:
        return
    for target in missing:
        ask_licence(target, to, endpoint, accept_licence)
    for target, plan in zip(missing, plans, strict=True):
        pull_one(target, plan, to, endpoint)


def check_pinned(target: Target) -> None:
    """End the command unless the revision is a commit."""
    if not target.source.is_pinned:
        fail(
            f"{target.name}: {target.source} may change: name a commit, 40 hexadecimal digits, in"
            " place of a branch or tag"
        )


def plan_of(target: Target, to: Path | None, endpoint: str | None) -> "DownloadPlan":
    """Return what the download takes, and print it; end the command with the hub's refusal."""
    from flux_ray.weights.download import plan_download

    with said_by(target):
        plan = plan_download(target.source, ALL_PARTS, target.folder(to), endpoint)
    typer.echo(
        f"{target.name}: {target.source.location}, {plan.num_missing_bytes / GB:.2f} of"
        f" {plan.num_bytes / GB:.2f} GB are missing, {plan.num_free_bytes / GB:.2f} GB are free"
    )
    return plan


def check_room_for_all(targets: list[Target], plans: list["DownloadPlan"], to: Path | None) -> None:
    """End the command if the disk has not enough room for all of them together."""
    from flux_ray.weights.download import DownloadPlan, check_room

    if plans:
        needed = sum(plan.num_missing_bytes for plan in plans)
        free = min(plan.num_free_bytes for plan in plans)
        names = ", ".join(target.name for target in targets)
        try:
            check_room(names, DownloadPlan(needed, needed, free), to)
        except WeightsUnavailable as error:
            fail(str(error))


def ask_licence(target: Target, to: Path | None, endpoint: str | None, is_given: bool) -> None:
    """Show the licence; unless it was accepted before, ask, or end the command off a terminal."""
    from flux_ray.weights.hub import endpoint_of

    page = f"{endpoint_of(endpoint)}/{target.source.location}"
    typer.echo(f"{target.name}: licence {target.licence}, see {page}")
    if target.is_accepted(to):
        return
    if not is_given:
        if not typer.get_text_stream("stdin").isatty():
            fail(f"{target.name}: read its licence at {page}, then say --accept-licence")
        typer.confirm("Do you accept it?", abort=True)
    target.accept(to)


def pull_one(target: Target, plan: "DownloadPlan", to: Path | None, endpoint: str | None) -> None:
    """Download and verify; what is damaged is deleted, and ends the command."""
    from flux_ray.weights.download import download, one_of_machine
    from flux_ray.weights.hub import kept_files, list_path, used_files
    from flux_ray.weights.verification import remove_damaged, verify_folder

    folder = target.folder(to)
    turn = one_of_machine(target.source) if folder is None else nullcontext()
    with said_by(target), turn:
        with bar(f"{target.name}: downloading", plan.num_missing_bytes) as hear:
            place = download(target.source, ALL_PARTS, hear, folder, endpoint)
        files = used_files(kept_files(list_path(target.source, folder)) or [], ALL_PARTS)
        with bar(f"{target.name}: verifying", sum(file.num_bytes for file in files)) as hear:
            found = verify_folder(place, files, hear)
    if not found.is_whole:
        bad = (*found.damaged, *found.missing)
        remove_damaged(place, found.damaged)
        fail(f"{target.name}: damaged on the way: {', '.join(bad)}; pull again")
    typer.echo(f"{target.name}: {found.num_files} files in {place}, all as the hub lists them")


@weights.command()
def verify(
    what: Annotated[
        list[str], typer.Argument(metavar="WHAT...", help="Tiers, config files, or folders.")
    ],
    online: Annotated[bool, typer.Option("--online", help="Ask the hub for checksums.")] = False,
    endpoint: Endpoint = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete damaged files, for the next pull.")
    ] = False,
) -> None:
    """Verify the weights of WHAT by their checksums, offline.

    Exit status: 0 if all are whole, 1 if any is not, 2 for wrong options.

    Example: flux-ray weights verify flux-2-klein-4b
    """
    # All of them, whatever is wrong with the first.
    are_whole = [verify_one(target, online, endpoint, remove) for target in folders_of(what)]
    if not all(are_whole):
        raise typer.Exit(1)


def verify_one(target: Target, online: bool, endpoint: str | None, remove: bool) -> bool:
    """Verify weights, print what is wrong with them, and return whether nothing is."""
    from flux_ray.weights.verification import expected_files, remove_damaged, verify_folder

    if target.is_embedded:
        typer.echo(f"{target.name}: its weights are in this package, nothing to verify")
        return True
    place = target.place()
    with said_by(target):
        if not place.is_dir():
            raise WeightsUnavailable(f"not on this machine: pull {target.source} first")
        files = asked_of_hub(target, endpoint) if online else expected_files(place)
    with bar(f"{target.name}: verifying", sum(file.num_bytes for file in files)) as hear:
        found = verify_folder(place, files, hear)
    for kind, paths in (("damaged", found.damaged), ("missing", found.missing)):
        for path in paths:
            typer.secho(f"{target.name}: {kind}: {place / path}", fg="red", err=True)
    if remove:
        remove_damaged(place, found.damaged)
    if found.is_whole:
        typer.echo(f"{target.name}: {found.num_files} files in {place} are whole")
    return found.is_whole


def asked_of_hub(target: Target, endpoint: str | None) -> "list[HubFile]":
    """Return the files that the hub lists; raise WeightsUnavailable for a folder of no revision."""
    from flux_ray.weights.hub import asked_files, used_files

    if target.source.revision is None:
        raise WeightsUnavailable("which hub has the folder's files is not known: name the tier")
    return used_files(asked_files(target.source, endpoint), ALL_PARTS)


@weights.command()
def shard(
    tier: Annotated[str, typer.Argument(help="A tier; its weights are on this machine.")],
    tensor: Annotated[int, typer.Option(min=1, help="As `parallel.tensor`.")],
    sequence: Annotated[int, typer.Option(min=1, help="As `parallel.sequence`.")] = 1,
    shared_text_encoder: Annotated[
        bool, typer.Option("--shared-text-encoder", help="As `text_encoder: shared`.")
    ] = False,
    source: Annotated[
        str | None, typer.Option("--weights", help="As `weights`; else the published ones.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="A new folder.", show_default="TIER-tpTENSOR")
    ] = None,
) -> None:
    """Split the weights of TIER into a file for each rank, and name the folder as `weights`.

    Exit status: 0 if the folder is written, 1 if it cannot be, 2 for wrong options.

    Example: flux-ray weights shard flux-2-dev --tensor 2 --to /models/flux-2-dev-tp2
    """
    to = to or Path(f"{tier}-tp{tensor}")
    try:
        # Imported here only: torch takes seconds, which the other commands must not wait for.
        from flux_ray.engine.shard import write_shards

        manifest = write_shards(
            tier_for(tier),
            source,
            Parallel(tensor=tensor, sequence=sequence),
            "shared" if shared_text_encoder else "colocated",
            to,
            typer.echo,
        )
    except (ValueError, UnknownTier, OSError) as error:
        fail(f"{tier}: {error}")
    typer.echo(f"{to} is made of {manifest.source}: say `weights: {to.absolute()}`")


@contextmanager
def bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of bytes on a terminal, else a line now and then; yield its counter."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines(what, num_bytes)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda advance: progress.advance(task, advance)


def lines(what: str, num_bytes: int) -> Callable[[int], None]:
    """Return a counter that prints a line for each LINE_PERCENT of the bytes."""
    done, said, lock = 0, 0, threading.Lock()

    def hear(num: int) -> None:
        nonlocal done, said
        with lock:
            done += num
            percent = 100 * done // max(num_bytes, 1)
            if percent >= said + LINE_PERCENT:
                said = percent
                typer.echo(f"{what}: {done / GB:.2f} of {num_bytes / GB:.2f} GB", err=True)

    return hear
