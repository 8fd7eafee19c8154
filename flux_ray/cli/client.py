"""One call to the gateway, with a progress bar while it runs; failures end the command."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

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
    """The tiers, a generation, or with pictures an edit."""
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
