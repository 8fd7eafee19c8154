"""`flux-ray status`: what a cluster serves now, once or live: tiers, replicas, queues, promises.

Applications and replicas come from Ray's dashboard, readiness from the gateway, and queues and
rates from the metrics of the nodes. What cannot be asked is left open, and said below the table.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flux_ray.cli.client import DEFAULT_URL, table_console
from flux_ray.cli.dashboard import (
    DEFAULT_ADDRESS,
    Address,
    Dashboard,
    DashboardError,
    TokenFile,
    dashboard_at,
    is_local,
)
from flux_ray.cli.deployment import RUNNING, num_in_state, progress_of
from flux_ray.cli.scrape import Counted, rate, scrape

GATEWAY_TIMEOUT_S = 10.0
# Nodes renew their metrics every ten seconds, so that rates of less than a minute jump.
WINDOW_S = 60.0
LEAVING = ("STOPPING", "PENDING_MIGRATION")


@dataclass(frozen=True)
class TierStatus:
    """A tier as the cluster sees it; None is not known.

    `ranks`: processes of one replica; `gpus`: those that its running replicas hold. `queued` and
    `queued_s`: requests that wait, and their replica seconds. `kept` and `missed`: deadlines since
    the gateways started. `images`: those of replicas that run now.
    """

    tier: str
    state: str
    message: str
    is_ready: bool | None
    running: int
    wanted: int
    starting: int
    leaving: int
    ranks: int
    gpus: int
    queued: float | None = None
    queued_s: float | None = None
    kept: float | None = None
    missed: float | None = None
    images: float | None = None
    images_per_s: float | None = None

    @property
    def kept_share(self) -> float | None:
        """Return the share of deadlines that were kept, or None before the first one."""
        if self.kept is None and self.missed is None:
            return None
        kept, missed = self.kept or 0.0, self.missed or 0.0
        return kept / (kept + missed) if kept + missed else None


@dataclass(frozen=True)
class GatewayStatus:
    """What `/readyz` says: the tiers that can serve now, or why none can."""

    url: str
    ready_tiers: tuple[str, ...] | None
    problem: str = ""


@dataclass(frozen=True)
class ClusterStatus:
    """All that one look at a cluster shows; `problems` are sentences on what could not be asked."""

    gateway: GatewayStatus
    tiers: tuple[TierStatus, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def is_well(self) -> bool:
        """Return whether a tier can serve and every application runs."""
        states = [*(tier.state for tier in self.tiers), *(state for _, state in self.others)]
        return bool(self.gateway.ready_tiers) and all(state == RUNNING for state in states)


Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, till Ctrl-C.")]
Every = Annotated[float, typer.Option(min=0.2, help="With --watch: seconds between two looks.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object; with --watch, one a line.")]


def status(
    url: Annotated[str, typer.Argument(help="The gateway's address.")] = DEFAULT_URL,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    watch: Watch = False,
    every: Every = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show tiers, replicas, ranks, queues, deadlines kept and rates of a running cluster.

    Exit status: 0 if a tier can serve and all applications run, 1 if not, 2 for wrong options.

    Example: flux-ray status --watch
    """
    try:
        with dashboard_at(address, token_file) as dashboard:
            watcher = Watcher(url, dashboard)
            if watch:
                watcher.show_forever(every, as_json=as_json)
            seen = watcher.look()
    except DashboardError as error:
        seen = ClusterStatus(ask_gateway(url), problems=(str(error),))
    show(seen, as_json)
    if not seen.is_well:
        raise typer.Exit(1)


class Watcher:
    """Looks at one cluster, and remembers the scrapes of the last minute for rates."""

    def __init__(self, url: str, dashboard: Dashboard) -> None:
        self._url = url
        self._dashboard = dashboard
        self._scrapes: list[Counted] = []

    def look(self) -> ClusterStatus:
        """Ask dashboard, gateway and nodes once."""
        gateway = ask_gateway(self._url)
        try:
            details = self._dashboard.details()
        except DashboardError as error:
            return ClusterStatus(gateway, problems=(str(error),))
        problems = []
        try:
            samples = scrape(self._dashboard.metric_targets(), self._dashboard.versions().session)
            self._remember(Counted(tuple(samples), time.monotonic()))
            if not samples:
                problems.append("no node told its metrics, so queues and rates are not known")
        except DashboardError as error:
            problems.append(f"queues and rates are not known: {error}")
        now = self._scrapes[-1] if self._scrapes else None
        before = self._scrapes[0] if len(self._scrapes) > 1 else None
        tiers, others = applications(details, gateway, now, before)
        return ClusterStatus(gateway, tuple(tiers), tuple(others), tuple(problems))

    def _remember(self, counted: Counted) -> None:
        self._scrapes.append(counted)
        while len(self._scrapes) > 2 and counted.at_s - self._scrapes[1].at_s >= WINDOW_S:
            self._scrapes.pop(0)

    def show_forever(self, every_s: float, *, as_json: bool) -> None:
        """Show the cluster until Ctrl-C: in place in a terminal, else again and again."""
        console = table_console()
        try:
            if as_json or not console.is_terminal:
                while True:
                    show(self.look(), as_json)
                    time.sleep(every_s)
            with Live(console=console, refresh_per_second=4) as live:
                while True:
                    live.update(drawn(self.look()))
                    time.sleep(every_s)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def ask_gateway(url: str) -> GatewayStatus:
    """Return which tiers the gateway calls ready, or why it names none."""
    try:
        with httpx.Client(timeout=GATEWAY_TIMEOUT_S, trust_env=not is_local(url)) as client:
            response = client.get(f"{url.rstrip('/')}/readyz")
    except (httpx.HTTPError, httpx.InvalidURL):
        return GatewayStatus(url, None, f"nothing answers at {url}")
    return gateway_status(url, response)


def gateway_status(url: str, response: httpx.Response) -> GatewayStatus:
    """Return what an answer of `/readyz` says."""
    try:
        body = response.json()
        if response.is_success:
            return GatewayStatus(url, tuple(body["tiers"]))
        return GatewayStatus(url, (), str(body["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        problem = f"{url} answers {response.status_code}, but not as a flux-ray gateway does"
        return GatewayStatus(url, None, problem)


def applications(
    details: Mapping[str, Any], gateway: GatewayStatus, now: Counted | None, before: Counted | None
) -> tuple[list[TierStatus], list[tuple[str, str]]]:
    """Return the tiers, and name and state of all other applications."""
    tiers, others = [], []
    for name, application in details["applications"].items():
        args = (application.get("deployed_app_config") or {}).get("args") or {}
        if "tier" in args:
            tiers.append(tier_status(name, application, args, gateway, now, before))
        else:
            others.append((name, str(application.get("status"))))
    return tiers, others


def tier_status(
    name: str,
    application: Mapping[str, Any],
    args: Mapping[str, Any],
    gateway: GatewayStatus,
    now: Counted | None,
    before: Counted | None,
) -> TierStatus:
    """Return the status of one tier; its own deployment has its name."""
    row = progress_of(name, application)
    own = application.get("deployments", {}).get(name, {})
    running = num_in_state(own, "RUNNING")
    parallel = args.get("parallel") or {}
    ranks = int(parallel.get("tensor", 1)) * int(parallel.get("sequence", 1))
    counted: dict[str, float | None] = {}
    if now is not None:
        counted = {
            "queued": now.total("QUEUED_REQUESTS", name),
            "queued_s": now.total("QUEUED_SECONDS", name),
            "kept": now.total("PROMISES", name, outcome="kept"),
            "missed": now.total("PROMISES", name, outcome="missed"),
            "images": now.total("IMAGES", name),
            "images_per_s": rate(before, now, "IMAGES", name),
        }
    return TierStatus(
        tier=name,
        state=row.status,
        message=row.message,
        is_ready=None if gateway.ready_tiers is None else name in gateway.ready_tiers,
        running=running,
        wanted=int(own.get("target_num_replicas", 0)),
        starting=num_in_state(own, "STARTING"),
        leaving=sum(num_in_state(own, state) for state in LEAVING),
        ranks=ranks,
        gpus=0 if args.get("device") == "cpu" else running * ranks,
        **counted,
    )


def show(seen: ClusterStatus, as_json: bool) -> None:
    """Print a look at the cluster, as JSON or as a table."""
    if as_json:
        typer.echo(json.dumps(asdict(seen) | {"is_well": seen.is_well}))
    else:
        table_console().print(drawn(seen))


def drawn(seen: ClusterStatus) -> Group:
    """Return the table of tiers, a line on the gateway, and what could not be asked."""
    table = Table("tier", "state", "ready")
    for column in ("replicas", "ranks", "GPUs", "queued", "queue s", "in time", "images", "a min"):
        table.add_column(column, justify="right")
    for tier in seen.tiers:
        table.add_row(*row_of(tier))
    gateway = seen.gateway
    ready = ", ".join(gateway.ready_tiers or ())
    lines = [f"gateway {gateway.url}: {f'ready for {ready}' if ready else gateway.problem}"]
    lines += [f"{name}: {state.lower().replace('_', ' ')}" for name, state in seen.others]
    lines += [f"{tier.tier}: {tier.message}" for tier in seen.tiers if tier.message]
    return Group(*([table] if seen.tiers else []), *map(Text, [*lines, *seen.problems]))


def row_of(tier: TierStatus) -> list[Text]:
    """Return the cells of one tier."""
    replicas = f"{tier.running} of {tier.wanted}"
    replicas += f", {tier.starting} starting" if tier.starting else ""
    replicas += f", {tier.leaving} leaving" if tier.leaving else ""
    share, a_s = tier.kept_share, tier.images_per_s
    return [
        Text(tier.tier),
        Text(tier.state.lower().replace("_", " "), "green" if tier.state == RUNNING else "yellow"),
        Text("?" if tier.is_ready is None else "yes" if tier.is_ready else "no"),
        Text(replicas),
        Text(f"{tier.running} x {tier.ranks}"),
        Text(str(tier.gpus)),
        Text(number(tier.queued, 0)),
        Text(number(tier.queued_s, 1)),
        Text("-" if share is None else f"{100 * share:.1f} %"),
        Text(number(tier.images, 0)),
        Text("-" if a_s is None else number(60 * a_s, 1)),
    ]


def number(value: float | None, digits: int) -> str:
    """Return a number with so many decimals, or a dash if it is not known."""
    return "-" if value is None else f"{value:,.{digits}f}"
