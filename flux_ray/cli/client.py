"""One call to the gateway, with a progress bar while it runs; failures end the command.

Where tables go: the terminal as wide as it is, and a pipe as wide as they need.

The tiers of a Serve config file, checked as the cluster will check them.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import httpx
import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import Args, TierArgs
from flux_ray.errors import FluxError
from flux_ray.router.autoscaling.gpu_budget import Want, check_budget

TIMEOUT = httpx.Timeout(900.0, connect=10.0)


def call(
    url: str,
    fields: dict[str, Any] | None = None,
    images: Sequence[Path] = (),
    key_file: Path | None = None,
) -> tuple[dict[str, Any], float]:
    """The answer's body and the seconds it took; without fields, the list of tiers."""
    started_s = time.monotonic()
    headers = {} if key_file is None else {"authorization": f"Bearer {secret_in(key_file)}"}
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers) as client, waiting():
            response = send(client, fields, images)
    except httpx.ConnectError:
        fail(f"nothing answers at {url}: is the cluster running? `make serve` starts one here")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        fail(f"the call to {url} failed: {error}")
    if response.is_error:
        fail(message_of(response))
    return read_json(response), time.monotonic() - started_s


def secret_in(key_file: Path) -> str:
    """As `flux-ray keys create` printed it; on the command line everybody could read it."""
    secret = key_file.read_text(errors="replace").strip()
    if not secret.isascii() or len(secret.split()) != 1:
        fail(f"{key_file} holds no API key")
    return secret


def send(
    client: httpx.Client, fields: dict[str, Any] | None, images: Sequence[Path]
) -> httpx.Response:
    """The tiers, a generation, or with images an edit."""
    if fields is None:
        return client.get("/v1/models")
    if not images:
        return client.post("/v1/images/generations", json=fields)
    with ExitStack() as stack:
        files = [
            ("image[]", (f"image{number}", stack.enter_context(path.open("rb"))))
            for number, path in enumerate(images)
        ]
        return client.post("/v1/images/edits", data=fields, files=files)


def waiting() -> Progress:
    """A bar that moves while the cluster works; it goes away afterwards."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.add_task("drawing", total=None)
    return progress


def message_of(response: httpx.Response) -> str:
    """The server's own words, with the id under which its logs have the request."""
    message: str = read_json(response).get("error", {}).get("message", response.reason_phrase)
    request_id = response.headers.get("x-request-id", "without id")
    if response.is_server_error and request_id not in message:
        return f"{message} (request {request_id})"
    return message


def read_json(response: httpx.Response) -> dict[str, Any]:
    """Other bodies than ours come from something that is no gateway."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or not ("data" in body or isinstance(body.get("error"), dict)):
        fail(f"{response.url} answered {response.status_code}, but not as a flux-ray gateway does")
    return body


def fail(message: str) -> NoReturn:
    """Say why, and end with status 1."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(1)


# A pipe has no width of its own, and rich's 80 columns would cut the tables.
PIPED_WIDTH = 132


def table_console() -> Console:
    """Standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


BUILDERS: dict[str, type[Args]] = {
    "flux_ray.app:build_tier": TierArgs,
    "flux_ray.app:build_gateway": GatewayArgs,
}


def tiers_in(path: Path) -> list[TierArgs]:
    """The args of the applications that are tiers; a file that says nonsense ends the command."""
    tiers = [args for args in map(args_of, applications_in(path)) if isinstance(args, TierArgs)]
    if not tiers:
        fail(f"{path} serves no tier: none of its applications is one")
    check_gpu_budgets(tiers)
    return tiers


def check_gpu_budgets(tiers: list[TierArgs]) -> None:
    """One budget for all tiers that scale on GPUs, which holds what all of them must have."""
    wants, said = [], {}
    for args in tiers:
        scaling, size = args.autoscaling, args.num_gpus_per_replica
        if scaling is not None and size:
            wants.append(Want(args.tier, scaling.max_replicas, size, scaling.min_replicas))
            said[args.tier] = scaling.gpu_budget
    if len(set(said.values())) > 1:
        numbers = ", ".join(f"{tier} {number or 'none'}" for tier, number in said.items())
        fail(f"autoscaling.gpu_budget must be the same in all tiers that scale, not {numbers}")
    budget = next(iter(said.values()), None)
    if budget is None:
        return
    try:
        check_budget(wants, budget)
    except ValueError as error:
        fail(f"autoscaling.{error}")


def applications_in(path: Path) -> list[dict[str, Any]]:
    """The file's applications, all of them ours."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}")
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        fail(f"{path} is no Serve config file: it has no list of `applications`")
    return applications


def args_of(application: dict[str, Any]) -> Args:
    """Its typed args; what is wrong with them is named by application and key."""
    name, import_path = application.get("name"), application.get("import_path")
    if import_path not in BUILDERS:
        fail(f"application {name}: import_path {import_path} is none of {', '.join(BUILDERS)}")
    try:
        return BUILDERS[import_path].model_validate(application.get("args", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["args", *(str(part) for part in first["loc"])])
        fail(f"application {name}: {key}: {first['msg']}")
    except FluxError as error:
        fail(f"application {name}: {error}")
