"""The keys file on disk: read whole or not at all, written in one step, and by one at a time."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from flux_ray.auth.keys import KeyFile


class Stamp(NamedTuple):
    """What changes with a file's contents."""

    modified_ns: int
    num_bytes: int
    inode: int


def stamp_of(path: Path) -> Stamp | None:
    """None where there is no file to be read. Follows links, as mounted secrets are."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


def read_keys(path: Path) -> KeyFile:
    """JSON by its name, else YAML. ValueError says what is wrong, and shows no value."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return KeyFile.model_validate({} if found is None else found)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {where}{': ' if where else ''}{message}") from None
    except (ValueError, yaml.YAMLError):
        # Their messages quote the line.
        raise ValueError(f"{path}: it cannot be read as YAML or JSON") from None


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile]) -> KeyFile:
    """Put what `change` makes of the file in its place; without a file it begins with an empty one.

    Two that change it at once take turns, so that no key is lost.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        changed = change(read_keys(path) if path.exists() else KeyFile())
        write_keys(path, changed)
        return changed
    finally:
        # Which also ends the lock.
        os.close(folder)


def write_keys(path: Path, file: KeyFile) -> None:
    """For the owner's eyes only; whoever reads meanwhile finds the old file or the new one."""
    kept = file.model_dump(mode="json", by_alias=True, exclude_none=True)
    # A link stays one.
    target = path.resolve()
    # Made with the mode 0600.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w") as new:
            new.write(dumped(kept, is_json=path.suffix == ".json"))
            new.flush()
            os.fsync(new.fileno())
        Path(name).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def dumped(kept: object, *, is_json: bool) -> str:
    """As text."""
    if is_json:
        return json.dumps(kept, indent=2) + "\n"
    text: str = yaml.safe_dump(kept, sort_keys=False)
    return text
