"""Serve FLUX image models on a Ray cluster: deploy and watch it, ask it for images, plan it.

Every command ends with status 0 if all went well, 1 if not, and 2 for wrong options.
"""

from typing import Annotated

import typer
from rich.table import Table

from flux_ray import __version__
from flux_ray.cli.bench import bench
from flux_ray.cli.client import DEFAULT_URL, KeyFile, Url, call, table_console
from flux_ray.cli.deploy import deploy
from flux_ray.cli.doctor import doctor
from flux_ray.cli.generate import generate
from flux_ray.cli.keys import keys
from flux_ray.cli.plan import plan
from flux_ray.cli.serve import serve
from flux_ray.cli.simulate import simulate
from flux_ray.cli.status import status
from flux_ray.cli.weights import weights

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(deploy)
app.command()(status)
app.command()(doctor)
app.command()(generate)
app.command()(bench)
app.command()(plan)
app.command()(serve)
app.command()(simulate)
app.add_typer(keys, name="keys")
app.add_typer(weights, name="weights")


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
    """Take the options that may stand before the name of a command."""


@app.command()
def tiers(url: Url = DEFAULT_URL, key_file: KeyFile = None) -> None:
    """List the tiers that the gateway serves.

    Exit status: 0, or 1 if the gateway does not answer.

    Example: flux-ray tiers --url http://127.0.0.1:8000
    """
    answer, _ = call(url, key_file=key_file)
    columns = ("id", "default_size", "default_steps", "max_references", "license")
    table = Table(*columns)
    for model in answer["data"]:
        table.add_row(*(str(model[column]) for column in columns))
    table_console().print(table)


@app.command()
def version() -> None:
    """Print the version of this command.

    Exit status: 0.

    Example: flux-ray version
    """
    typer.echo(__version__)
