"""`flux-ray bench`: send a trace or made-up traffic at an images server, and say how it did."""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flux_ray.cli.client import KeyFile, fail, secret_in, table_console
from flux_ray.cli.load import (
    OK,
    Arrivals,
    LoadSummary,
    OpenLoop,
    PlannedRequest,
    SentRequest,
    arrivals,
    from_trace,
    summary_of,
)
from flux_ray.simulator.traffic import from_zero, read_trace

PROMPTS = (
    "a red circle on a blue background",
    "a green square on a white background",
    "a yellow triangle left of a blue ring",
    "two small orange circles on a black background",
)
# The client is to blame for lateness above this, not the server.
MAX_LAG_S = 0.1

Server = Annotated[str, typer.Argument(help="The server's address, without /v1.")]
Trace = Annotated[
    Path | None,
    typer.Option(exists=True, help="A file of JSON lines, or a folder that gateways recorded."),
]
Rate = Annotated[float, typer.Option(min=0.001, help="Requests a second, without --trace.")]
Duration = Annotated[float, typer.Option(min=0.1, help="Seconds in which they are sent.")]
Concurrency = Annotated[
    int, typer.Option(min=1, help="At most so many at once; a later one is late by its wait.")
]
Model = Annotated[
    str | None, typer.Option(help="The model; with --trace in place of the trace's tiers.")
]
Prompts = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A file with a prompt a line.")
]
Deadline = Annotated[
    float | None,
    typer.Option(min=0.001, help="Seconds for each, without --trace; sent to flux-ray too."),
]


def bench(
    url: Server,
    trace: Trace = None,
    rate: Rate = 1.0,
    duration: Duration = 30.0,
    pattern: Annotated[Arrivals, typer.Option("--arrivals", help="How they come.")] = "poisson",
    concurrency: Concurrency = 1024,
    model: Model = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; else the server's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; else its own.")] = None,
    num_images: Annotated[int, typer.Option("-n", "--n", min=1, help="Images a request.")] = 1,
    references: Annotated[int, typer.Option(min=0, help="Reference images of noise.")] = 0,
    prompts: Prompts = None,
    deadline: Deadline = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until one is given up.")] = 600.0,
    seed: Annotated[int, typer.Option(help="The same one sends the same requests.")] = 0,
    key_file: KeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Send requests at URL on a schedule and print throughput, latency, errors and deadlines kept.

    URL is that of any server with OpenAI's images API. Latency counts from when a request was due.
    Exit status: 0 if any request was answered with images, 1 if none was, 2 for wrong options.

    Example: flux-ray bench http://127.0.0.1:8000 --model tiny --rate 2 --duration 30
    """
    words = read_prompts(prompts)
    if trace is None:
        fields = {"model": model, "size": size, "num_inference_steps": steps, "n": num_images}
        given = {name: value for name, value in fields.items() if value is not None}
        every = PlannedRequest(0.0, given, deadline, references)
        planned = made_up(arrivals(rate, duration, pattern, seed), every, words, seed)
    else:
        planned = traced(trace, words, model, seed)
    show(summary_of(send_all(url, key_file, planned, concurrency, timeout)), as_json)


def show(summary: LoadSummary, as_json: bool) -> None:
    """Print the summary, as JSON or as tables; end the command if nothing was answered."""
    if as_json:
        typer.echo(json.dumps(report_of(summary)))
    else:
        print_summary(summary, table_console())
    if not summary.num_ok:
        fail(f"no request was answered with images: {outcomes_text(summary)}")


def made_up(
    times: Sequence[float], every: PlannedRequest, words: Sequence[str], seed: int
) -> list[PlannedRequest]:
    """Return requests like `every` at these times, each with its own prompt and seed."""
    return [
        replace(
            every,
            at_s=at_s,
            fields={**every.fields, "prompt": words[number % len(words)], "seed": seed + number},
        )
        for number, at_s in enumerate(times)
    ]


def read_prompts(path: Path | None) -> list[str]:
    """Return the lines of a file, or some prompts of the embedded model's world without one."""
    if path is None:
        return list(PROMPTS)
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        fail(f"--prompts {path} cannot be read: {error}")
    if not lines:
        fail(f"--prompts {path} has no line with a prompt")
    return lines


def traced(path: Path, words: list[str], model: str | None, seed: int) -> list[PlannedRequest]:
    """Return the requests of a trace; end the command if a line of it is wrong."""
    try:
        return from_trace(from_zero(read_trace(path)), words, model, seed)
    except ValueError as error:
        fail(f"--trace {error}")


def send_all(
    url: str,
    key_file: Path | None,
    planned: list[PlannedRequest],
    num_at_once: int,
    timeout_s: float,
) -> list[SentRequest]:
    """Send all requests and show how far they are, in a terminal."""
    if not planned:
        fail("there is no request to send: give --trace more entries, or a longer --duration")
    headers = {} if key_file is None else {"authorization": f"Bearer {secret_in(key_file)}"}

    async def run(bar: Progress) -> list[SentRequest]:
        task = bar.add_task("sending", total=len(planned), failed=0)

        def count(sent: SentRequest) -> None:
            num_failed = bar.tasks[0].fields["failed"] + (sent.outcome != OK)
            bar.update(task, advance=1, failed=num_failed)

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_at_once)
        timeout = httpx.Timeout(timeout_s, pool=None)
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout, limits=limits
        ) as client:
            return await OpenLoop(client, num_at_once, count).run(planned)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    failed = TextColumn("{task.fields[failed]} failed")
    console = Console(stderr=True)
    with Progress(
        *columns, failed, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        try:
            return asyncio.run(run(bar))
        except* (httpx.InvalidURL, httpx.UnsupportedProtocol):
            fail(f"{url} is no address of a server: say http://HOST:PORT")


def report_of(summary: LoadSummary) -> dict[str, Any]:
    """Return the summary as JSON has it: a latency that no request had is null."""
    report = asdict(summary)
    report["latency_s"] = {
        name: None if math.isnan(value) else value for name, value in summary.latency_s.items()
    }
    return report | {
        "images_per_s": summary.images_per_s,
        "requests_per_s": summary.requests_per_s,
    }


def outcomes_text(summary: LoadSummary) -> str:
    """Return how many requests ended how: `12 ok, 3 of 429, 1 ReadTimeout`."""
    return ", ".join(f"{count} {outcome}" for outcome, count in summary.outcomes.items())


def print_summary(summary: LoadSummary, console: Console) -> None:
    """Print the summary as two tables, and a line if the client itself was too slow."""
    table = Table("sent", "answered", "images", "seconds", "images/s", "requests/s", "in time")
    in_time = f"{summary.num_in_time} of {summary.num_with_deadline}"
    table.add_row(
        str(summary.num_sent),
        str(summary.num_ok),
        str(summary.num_images),
        f"{summary.taken_s:.1f}",
        f"{summary.images_per_s:.2f}",
        f"{summary.requests_per_s:.2f}",
        in_time if summary.num_with_deadline else "-",
    )
    console.print(table)
    latency = Table("latency, s", *summary.latency_s)
    latency.add_row("from when it was due", *(f"{each:.2f}" for each in summary.latency_s.values()))
    console.print(latency)
    console.print(f"ended: {outcomes_text(summary)}", markup=False, highlight=False)
    if summary.lag_s > MAX_LAG_S:
        console.print(
            f"The last hundredth was sent {summary.lag_s:.2f} s late or more: this client or"
            " --concurrency was the bottleneck.",
            markup=False,
            highlight=False,
        )
