"""Files and folders of ours: for no other user of the machine, whoever made what is around them."""

import os
import stat
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> None:
    """Make it, and what is missing above it; pathlib opens the latter to all. Raises OSError."""
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    for each in reversed(missing):
        # Another process may make it at the same time.
        each.mkdir(mode=FOLDER_MODE, exist_ok=True)


def open_privately(path: str, flags: int) -> int:
    """Open a file, which is made where it is not there: the `opener` of Python's `open`."""
    return os.open(path, flags, FILE_MODE)


def is_open_to_others(path: Path) -> bool:
    """Say whether users other than the owner may do anything with what is there."""
    try:
        return bool(path.stat().st_mode & OTHERS)
    except FileNotFoundError:
        return False


def keep_from_others(path: Path) -> bool:
    """Take away what others may do with a file; False where it is not ours to change."""
    if not is_open_to_others(path):
        return True
    try:
        path.chmod(FILE_MODE)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
