"""Parts that several commands share: calls to a gateway, tables, the tiers of a config file.

`call` shows a progress bar while the gateway works. `tiers_in` checks a config file as the cluster
will. Whatever fails ends the command with a message and status 1 (`fail`).
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

from flux_ray.config import Args, GatewayArgs, TierArgs
from flux_ray.errors import FluxError
from flux_ray.router.autoscaling.gpu_budget import Want, check_budget

TIMEOUT = httpx.Timeout(900.0, connect=10.0)


def call(
    url: str,
    fields: dict[str, Any] | None = None,
    images: Sequence[Path] = (),
    key_file: Path | None = None,
) -> tuple[dict[str, Any], float]:
    """Ask the gateway; return the body of its answer and the seconds that it took.

    Without `fields` ask for the list of tiers, otherwise for images.
    """
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
    """Return the API key that a file holds; on the command line all users could read it."""
    secret = key_file.read_text(errors="replace").strip()
    if not secret.isascii() or len(secret.split()) != 1:
        fail(f"{key_file} holds no API key")
    return secret


def send(
    client: httpx.Client, fields: dict[str, Any] | None, images: Sequence[Path]
) -> httpx.Response:
    """Send a request: for the tiers without fields, for an edit if there are images."""
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
    """Return a progress bar that moves while the cluster works, and vanishes afterwards."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.add_task("generating", total=None)
    return progress


def message_of(response: httpx.Response) -> str:
    """Return the server's message, with the request's id in its logs if the server failed."""
    message: str = read_json(response).get("error", {}).get("message", response.reason_phrase)
    request_id = response.headers.get("x-request-id", "without id")
    if response.is_server_error and request_id not in message:
        return f"{message} (request {request_id})"
    return message


def read_json(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON of an answer; end the command if it is not from a flux-ray gateway."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or not ("data" in body or isinstance(body.get("error"), dict)):
        fail(f"{response.url} answered {response.status_code}, but not as a flux-ray gateway does")
    return body


def fail(message: str) -> NoReturn:
    """Print an error and end the command with status 1."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(1)


# A pipe has no width, and the 80 columns that rich assumes would cut the tables.
PIPED_WIDTH = 132


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal, or PIPED_WIDTH in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


BUILDERS: dict[str, type[Args]] = {
    "flux_ray.app:build_tier": TierArgs,
    "flux_ray.app:build_gateway": GatewayArgs,
}


def tiers_in(path: Path) -> list[TierArgs]:
    """Return the args of a config file's tiers; end the command if the file is invalid."""
    tiers = [args for args in map(args_of, applications_in(path)) if isinstance(args, TierArgs)]
    if not tiers:
        fail(f"{path} serves no tier: none of its applications is one")
    check_gpu_budgets(tiers)
    return tiers


def check_gpu_budgets(tiers: list[TierArgs]) -> None:
    """End the command unless all tiers that scale on GPUs name one budget that is enough."""
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
    """Return the list of applications in a Serve config file; end the command without one."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read: {error}")
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        fail(f"{path} is no Serve config file: it has no list of `applications`")
    return applications


def args_of(application: dict[str, Any]) -> Args:
    """Return an application's typed args; end the command, naming the key, if they are wrong."""
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
