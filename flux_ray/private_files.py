"""Make files and folders that no other user of the machine can read, whatever is around them."""

import os
import stat
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, all of them private; raise OSError if that fails.

    pathlib would make the missing parents readable for all.
    """
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    for each in reversed(missing):
        # Another process may make it at the same time.
        each.mkdir(mode=FOLDER_MODE, exist_ok=True)


def open_privately(path: str, flags: int) -> int:
    """Open a file, privately if it is new; to be used as the `opener` of Python's `open`."""
    return os.open(path, flags, FILE_MODE)


def is_open_to_others(path: Path) -> bool:
    """Return whether users other than the owner have any rights to a path."""
    try:
        return bool(path.stat().st_mode & OTHERS)
    except FileNotFoundError:
        return False


def keep_from_others(path: Path) -> bool:
    """Take away the rights of others to a file; return False if it is not ours to change."""
    if not is_open_to_others(path):
        return True
    try:
        path.chmod(FILE_MODE)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
