"""`flux-ray doctor`: look for what commonly breaks, and say in a sentence how to mend it."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flux_ray.catalog import ALL_EMBEDDED
from flux_ray.cli import diagnosis, probes
from flux_ray.cli.client import table_console
from flux_ray.cli.config_file import check_budgets, check_prices, read_config
from flux_ray.cli.dashboard import (
    DEFAULT_ADDRESS,
    Address,
    DashboardError,
    TokenFile,
    dashboard_at,
    find_token,
)
from flux_ray.cli.diagnosis import Diagnosis
from flux_ray.config import (
    GatewayArgs,
    JobArgs,
    NamedArgs,
    TierArgs,
    check_file,
    check_own_addresses,
    check_paths,
    environment,
    gateways_among,
    read_http_options,
    tiers_among,
)
from flux_ray.weights.source import ALL_PARTS, WeightsUnavailable
from flux_ray.weights.start import missing_bytes

COLORS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
TRACING = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="serve/*.yaml; else the machine alone."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at this machine, and CONFIG if it is named, for what commonly breaks.

    Run it on a node of the cluster; it changes nothing. Exit status: 0 if there is no problem, 1 if
    there is one, 2 for wrong options.

    Example: flux-ray doctor serve/one-gpu.yaml
    """
    with Console(stderr=True).status("looking"):
        found = list(examine(config, address, token_file))
    if as_json:
        typer.echo(json.dumps({"checks": [asdict(each) for each in found]}))
    else:
        show(found, table_console())
    if any(each.state == "problem" for each in found):
        raise typer.Exit(1)


def show(found: list[Diagnosis], console: Console) -> None:
    """Print a table in a terminal, else a line for each thing, that a program can search."""
    if console.is_terminal:
        console.print(table_of(found))
        return
    for each in found:
        typer.echo(f"{each.state:<8} {each.what}: {each.said}")


def table_of(found: list[Diagnosis]) -> Table:
    """Return a table with a line for each thing that was looked at."""
    table = Table("what", "state", "what to know, or to do")
    for each in found:
        table.add_row(Text(each.what), Text(each.state, COLORS[each.state]), Text(each.said))
    return table


def examine(path: Path | None, address: str, token_file: Path | None) -> Iterator[Diagnosis]:
    """Yield what was found, the file first, then the machine, then the cluster."""
    config: dict[str, Any] = {"applications": []} if path is None else read_config(path)
    applications, findings = check_file(config, allow_others=True)
    if path is not None:
        findings += [*check_prices(applications), *check_budgets(applications)]
        findings += check_own_addresses(applications)
        findings += check_paths(applications, is_here=True)
        for finding in findings:
            yield Diagnosis(path.name, "warning" if finding.is_warning else "problem", finding.text)
        if not findings:
            yield Diagnosis(path.name, "ok", "nothing is wrong with it as far as it can be read")
    tiers = [each.args for each in tiers_among(applications)]
    yield from examine_gpus(tiers)
    yield from examine_machine(config, applications)
    yield from examine_weights(tiers)
    yield from examine_cluster(address, token_file)


def examine_gpus(tiers: list[TierArgs]) -> Iterator[Diagnosis]:
    """Yield what can be said of torch, driver, NCCL, shared memory and compiler."""
    needs_gpu = any(args.device == "cuda" for args in tiers)
    num_ranks = max((args.parallel.num_ranks for args in tiers), default=1)
    torch, driver = probes.torch_facts(), probes.driver_version()
    yield diagnosis.judge_driver(torch, driver, needs_gpu)
    yield diagnosis.judge_nccl(torch, num_ranks, needs_gpu)
    yield diagnosis.judge_shared_memory(probes.shared_memory_bytes(), num_ranks)
    yield diagnosis.judge_compiler(probes.compiler(), needs_gpu)


def examine_machine(config: dict[str, Any], applications: list[NamedArgs]) -> Iterator[Diagnosis]:
    """Yield what can be said of ports, limits, tracing, the job database and the upsampler."""
    options, _ = read_http_options(config)
    is_taken = probes.is_port_taken(options.host, options.port)
    is_serve = is_taken and probes.answers_as_serve(options.url)
    yield diagnosis.judge_port(options.port, options.host, is_taken, is_serve)
    yield diagnosis.judge_open_files(probes.open_files_limit())
    variables = environment()
    tracing = (config.get("tracing_config") or {}).get("exporter_import_path")
    exporter = tracing or variables.get(TRACING)
    yield diagnosis.judge_tracing(exporter, probes.import_error(exporter) if exporter else None)
    gateways = [each.args for each in gateways_among(applications)]
    path = job_file(gateways)
    sessions = [] if path is None else probes.sessions_with(path)
    yield diagnosis.judge_job_file(None if path is None else str(path), sessions)
    yield from examine_upsamplers(gateways)


def examine_upsamplers(gateways: list[GatewayArgs]) -> Iterator[Diagnosis]:
    """Yield what can be said of each LLM that upsamples prompts, and of each of its models."""
    for args in gateways:
        upsampling = args.upsampling
        if upsampling is None:
            continue
        of_tiers = filter(None, map(upsampling.of_tier, args.tiers))
        for model in dict.fromkeys(each.model for each in of_tiers):
            assert model is not None
            heard = probes.ask_upsampler(upsampling, model)
            yield diagnosis.judge_upsampler(upsampling.url, model, heard)


def job_file(gateways: list[GatewayArgs]) -> Path | None:
    """Return the file of the jobs: the gateways' own, or without a config the default one."""
    if not gateways:
        return probes.database_path(JobArgs().database)
    named = [args.jobs.database for args in gateways if args.jobs is not None]
    return probes.database_path(named[0]) if named else None


def examine_weights(tiers: list[TierArgs]) -> Iterator[Diagnosis]:
    """Yield what can be said of each tier's weights, the disk for them, and the clock."""
    # Only here: what asks the hub takes long to import.
    from huggingface_hub import constants

    from flux_ray.weights.download import free_bytes
    from flux_ray.weights.hub import hub_date

    cache, sum_bytes = Path(constants.HF_HUB_CACHE), 0
    for args in tiers:
        if args.weights is not None and args.weights not in ALL_EMBEDDED:
            num_bytes, refused = 0, None
            try:
                num_bytes = missing_bytes(args, ALL_PARTS)
            except WeightsUnavailable as error:
                refused = error
            sum_bytes += num_bytes
            yield diagnosis.judge_weights(args.tier, args.weights, num_bytes, refused)
    yield diagnosis.judge_disk(free_bytes(cache), sum_bytes, str(cache))
    date = hub_date()
    ahead_s = None if date is None else probes.clock_offset_s(date, datetime.now(UTC))
    yield diagnosis.judge_clock(ahead_s)


def examine_cluster(address: str, token_file: Path | None) -> Iterator[Diagnosis]:
    """Yield what can be said of Ray's authentication, and of the versions of a running cluster."""
    variables = environment()
    try:
        token = find_token(token_file, variables, Path.home())
    except DashboardError as error:
        yield Diagnosis("Ray's authentication", "problem", str(error))
        return
    yield diagnosis.judge_auth(variables.get("RAY_AUTH_MODE"), token is not None)
    own = {"Ray": importlib.metadata.version("ray"), "Python": platform.python_version()}
    running: dict[str, str | None] = {}
    try:
        with dashboard_at(address, token_file) as dashboard:
            versions = dashboard.versions()
            running = {"Ray": versions.ray, "Python": versions.python}
    except DashboardError as error:
        if "nothing answers" not in str(error):
            yield Diagnosis("dashboard", "problem", str(error))
    yield diagnosis.judge_versions(own, running)
