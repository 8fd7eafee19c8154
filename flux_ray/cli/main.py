"""`flux-ray`: ask a running cluster for pictures, or plan and simulate one."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flux_ray import __version__
from flux_ray.cli.client import call, fail
from flux_ray.cli.images import output_format_for, paths_for, save
from flux_ray.cli.keys import keys
from flux_ray.cli.plan import plan
from flux_ray.cli.simulate import simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(plan)
app.command()(simulate)
app.add_typer(keys, name="keys")


def print_version(is_asked: bool) -> None:
    """Print the version and end, whatever else was said."""
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    is_version_asked: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take what may stand before the name of a command."""


Url = Annotated[str, typer.Option(help="The gateway's address.")]
DEFAULT_URL = "http://127.0.0.1:8000"
KeyFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file that holds your API key alone."),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", exists=True, dir_okay=False, help="A reference; repeatable."),
]


@app.command()
def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("-o", "--output", help=".png, .jpg or .webp")] = Path(
        "out.png"
    ),
    image: Images = None,
    url: Url = DEFAULT_URL,
    tier: Annotated[str | None, typer.Option(help="One of `flux-ray tiers`.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    steps: int | None = None,
    seed: int | None = None,
    num_images: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 1,
    key_file: KeyFile = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite files.")] = False,
) -> None:
    """Draw pictures of PROMPT, or edit the ones given with --image."""
    paths = paths_for(output, num_images)
    # Before anything is drawn that would then have no place.
    if not force and (taken := [str(path) for path in paths if path.exists()]):
        fail(f"there is already {', '.join(taken)}: choose another --output, or say --force")
    fields: dict[str, Any] = {
        "prompt": prompt,
        "output_format": output_format_for(output),
        "model": tier,
        "size": size,
        "steps": steps,
        "seed": seed,
        "n": num_images,
    }
    sent = {name: value for name, value in fields.items() if value is not None}
    answer, taken_s = call(url, sent, image or [], key_file)
    for warning in answer["warnings"]:
        typer.secho(warning, fg="yellow", err=True)
    for path, picture in zip(paths, answer["data"], strict=True):
        save(path, picture["b64_json"])
        typer.echo(f"{path}  seed {picture['seed']}  {taken_s:.2f} s")


@app.command()
def tiers(url: Url = DEFAULT_URL, key_file: KeyFile = None) -> None:
    """List the tiers that the gateway serves."""
    answer, _ = call(url, key_file=key_file)
    columns = ("id", "default_size", "default_steps", "max_references", "license")
    table = Table(*columns)
    for model in answer["data"]:
        table.add_row(*(str(model[column]) for column in columns))
    Console().print(table)


@app.command()
def version() -> None:
    """Print the version of this command."""
    typer.echo(__version__)
