"""Ask a running cluster for images, plan or simulate a cluster, and manage its API keys."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flux_ray import __version__
from flux_ray.auth import Key, change_keys, new_key, read_keys, with_key, without_key
from flux_ray.cli.client import call, fail, table_console
from flux_ray.cli.plan import plan
from flux_ray.cli.serve import serve
from flux_ray.cli.simulate import simulate
from flux_ray.cli.weights import weights

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def output_format_for(path: Path) -> str:
    """Return the image format for a file name; BadParameter if its ending is unknown."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise typer.BadParameter(f"{path} must end in one of: {', '.join(FORMATS)}") from None


def paths_for(path: Path, num_images: int) -> list[Path]:
    """Return the paths of all images: `out.png`, or for several `out-0.png`, `out-1.png`, ..."""
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(num_images)]


def save(path: Path, b64: str) -> None:
    """Write one image, given in base64; make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(b64))


keys = typer.Typer(no_args_is_help=True, help="API keys, in the file that `keys_file` names.")

File = Annotated[Path, typer.Option(help="The keys file: .yaml or .json.", dir_okay=False)]


@keys.command()
def create(
    name: Annotated[
        str, typer.Argument(help="The owner; several keys of one name are one caller.")
    ],
    file: File,
    key_class: Annotated[
        str | None, typer.Option("--class", help="One of the gateway's key_classes.")
    ] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="Else never.")] = None,
) -> None:
    """Make a key for NAME; its secret is printed here, once, and kept nowhere."""
    now = datetime.now(UTC)
    expires = None if expires_in_days is None else now + timedelta(days=expires_in_days)
    try:
        made = new_key(name, key_class, now, expires)
        change_keys(file, lambda kept: with_key(kept, made.key))
    except ValidationError as error:
        fail(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "))
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(made.secret)


@keys.command("list")
def list_keys(file: File) -> None:
    """List the keys of the file, without their secrets."""
    try:
        found = read_keys(file).keys
    except ValueError as error:
        fail(str(error))
    now = datetime.now(UTC)
    table = Table("prefix", "name", "class", "created", "expires", "state")
    for key in found:
        expires = "-" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}"
        created = f"{key.created:%Y-%m-%d %H:%M}"
        cells = (key.prefix, key.name, key.key_class or "-", created, expires, state_of(key, now))
        table.add_row(*(escape(cell) for cell in cells))
    table_console().print(table)


@keys.command()
def revoke(
    which: Annotated[str, typer.Argument(help="A key's prefix, or the name of all its keys.")],
    file: File,
) -> None:
    """Revoke a key, or all keys of a name; the gateways notice within seconds."""
    now = datetime.now(UTC)
    try:
        changed = change_keys(file, lambda kept: without_key(kept, which, now))
    except (ValueError, OSError) as error:
        fail(str(error))
    for key in changed.keys:
        if key.revoked == now:
            typer.echo(f"revoked {key.prefix} of {key.name}")


def state_of(key: Key, now: datetime) -> str:
    """Return `live`, `expired` or `revoked`."""
    if key.is_live(now):
        return "live"
    return "expired" if key.revoked is None else "revoked"


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
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
    """Generate images of PROMPT, or edit the ones given with --image."""
    paths = paths_for(output, num_images)
    # Checked first: the cluster must not generate images that could then not be saved.
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
    for path, answered in zip(paths, answer["data"], strict=True):
        save(path, answered["b64_json"])
        typer.echo(f"{path}  seed {answered['seed']}  {taken_s:.2f} s")


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
