"""`flux-ray keys`: create, list and revoke API keys, in the file that `keys_file` names."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from flux_ray.auth import Key, change_keys, new_key, read_keys, with_key, without_key
from flux_ray.cli.client import fail, table_console

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
    """Make a key for NAME; its secret is printed here, once, and kept nowhere.

    Exit status: 0, or 1 if the file cannot be read or written, 2 for wrong options.

    Example: flux-ray keys create alice --class paying --file keys.yaml
    """
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
    """List the keys of the file, without their secrets.

    Exit status: 0, or 1 if the file cannot be read, 2 for wrong options.

    Example: flux-ray keys list --file keys.yaml
    """
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
    """Revoke a key, or all keys of a name; the gateways notice within seconds.

    Exit status: 0, or 1 if there is no such key, 2 for wrong options.

    Example: flux-ray keys revoke fr-3xZ0aBcD --file keys.yaml
    """
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
