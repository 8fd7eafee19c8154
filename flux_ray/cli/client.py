"""Parts that several commands share: calls to a gateway, tables, and how a command fails.

`call` shows a progress bar while the gateway works. Whatever fails ends the command with a message
and status 1 (`fail`).
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

TIMEOUT = httpx.Timeout(900.0, connect=10.0)


DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="The gateway's address.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file that holds your API key alone."),
]


@dataclass(frozen=True)
class Attached:
    """The files that go with a request: references, a mask of the first, or a control image."""

    images: tuple[Path, ...] = ()
    mask: Path | None = None
    control: Path | None = None


@dataclass(frozen=True)
class ServerEvent:
    """An event of a stream, with the seconds since it was asked for."""

    name: str
    fields: dict[str, Any]
    at_s: float

    @property
    def is_preview(self) -> bool:
        """Return whether it carries a preview."""
        return self.name.endswith(".partial_image")

    @property
    def is_image(self) -> bool:
        """Return whether it carries a finished image."""
        return self.name.endswith(".completed")


def call(
    url: str,
    fields: dict[str, Any] | None = None,
    attached: Attached = Attached(),
    key_file: Path | None = None,
) -> tuple[dict[str, Any], float]:
    """Ask the gateway; return the body of its answer and the seconds that it took.

    Without `fields` ask for the list of tiers, otherwise for images.
    """
    started_s = time.monotonic()
    with explained(url), client_for(url, key_file) as client, waiting():
        response = client.get("/v1/models") if fields is None else send(client, fields, attached)
    if response.is_error:
        fail(message_of(response))
    return read_json(response), time.monotonic() - started_s


def follow(
    url: str,
    fields: dict[str, Any],
    attached: Attached,
    key_file: Path | None,
    num_images: int,
) -> Iterator[ServerEvent]:
    """Ask the gateway for a stream and yield its events; show meanwhile how far it is.

    An error event ends the command with its message.
    """
    started_s = time.monotonic()
    with (
        explained(url),
        client_for(url, key_file) as client,
        waiting() as bar,
        ExitStack() as stack,
    ):
        request = request_for(client, fields, attached, stack)
        response = client.send(request, stream=True)
        if response.is_error:
            response.read()
            fail(message_of(response))
        num_done = 0
        for each in parse_events(response.iter_lines()):
            if isinstance(each, str):
                show_standing(bar, each, num_done, num_images)
                continue
            name, data = each
            if name == "error":
                fail(str(data.get("error", {}).get("message", "the server failed")))
            event = ServerEvent(name, data, time.monotonic() - started_s)
            num_done += event.is_image
            yield event


def parse_events(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]] | str]:
    """Yield a stream's events, as name and fields, and its comments, as texts."""
    name, data = "", ""
    for line in lines:
        key, _, value = line.partition(": ")
        if line.startswith(":"):
            yield line.lstrip(": ")
        elif key == "event":
            name = value
        elif key == "data":
            data += value
        elif not line and data:
            yield name, json.loads(data)
            name, data = "", ""


def show_standing(bar: Progress, words: str, num_done: int, num_images: int) -> None:
    """Show what a comment of a stream says: a place in the queue, or the progress."""
    task = bar.tasks[0].id
    bar.update(task, description=words.split(" progress=")[0])
    if found := re.search(r"progress=([\d.]+)", words):
        bar.update(task, total=num_images, completed=num_done + float(found[1]))


def client_for(url: str, key_file: Path | None) -> httpx.Client:
    """Return a client of the gateway that sends the key, if there is one."""
    headers = {} if key_file is None else {"authorization": f"Bearer {secret_in(key_file)}"}
    return httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """End the command with a sentence if the gateway cannot be reached or the connection breaks."""
    try:
        yield
    except httpx.ConnectError:
        fail(f"nothing answers at {url}: is the cluster running? `make serve` starts one here")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        fail(f"the call to {url} failed: {error}")


def secret_in(key_file: Path) -> str:
    """Return the API key that a file holds; on the command line all users could read it."""
    secret = key_file.read_text(errors="replace").strip()
    if not secret.isascii() or len(secret.split()) != 1:
        fail(f"{key_file} holds no API key")
    return secret


def send(client: httpx.Client, fields: dict[str, Any], attached: Attached) -> httpx.Response:
    """Send a request for images, for an edit if there are any to begin with."""
    with ExitStack() as stack:
        return client.send(request_for(client, fields, attached, stack))


def request_for(
    client: httpx.Client, fields: dict[str, Any], attached: Attached, stack: ExitStack
) -> httpx.Request:
    """Return the request; `stack` closes the files that it reads."""
    check_text(fields)
    if not attached.images and attached.control is None:
        return client.build_request("POST", "/v1/images/generations", json=fields)
    files = [
        ("image[]", (f"image{number}", stack.enter_context(path.open("rb"))))
        for number, path in enumerate(attached.images)
    ]
    for name, path in (("mask", attached.mask), ("control_image", attached.control)):
        if path is not None:
            files.append((name, (name, stack.enter_context(path.open("rb")))))
    texts = {name: as_text(value) for name, value in fields.items()}
    return client.build_request("POST", "/v1/images/edits", data=texts, files=files)


def check_text(fields: dict[str, Any]) -> None:
    """End the command if a text is not UTF-8: Python keeps such bytes of a command line."""
    for name, value in fields.items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            fail(f"{name} is not UTF-8: is the terminal set to it?")


def as_text(value: Any) -> str:
    """Return a field's value as a form has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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


def complain(message: str) -> None:
    """Print an error to stderr."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    Console(stderr=True).print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Print an error and end the command with status 1."""
    complain(message)
    raise typer.Exit(1)


# A pipe has no width, and the 80 columns that rich assumes would cut the tables.
PIPED_WIDTH = 132


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal, or PIPED_WIDTH in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


def plural(number: int, noun: str) -> str:
    """Return the number with its noun: `1 GPU`, `2 GPUs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
