"""The file of an SQLite database: made for nobody else's eyes, and known again by its inode."""

import logging
import os
import shlex
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from sqlalchemy.engine import URL

from flux_ray.private_files import keep_from_others, make_folder, open_privately

logger = logging.getLogger("ray.serve")

# What SQLite keeps beside it, with the mode of the file itself.
COMPANIONS = ("", "-wal", "-shm")


class FileIdentity(NamedTuple):
    """What a file keeps as long as it is the same one, whatever is written into it."""

    device: int
    inode: int


class DatabaseFile:
    """One file; connections to it never make it, so that none finds an empty one in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make it where it is not there, and close it to others where it is. Raises OSError."""
        make_folder(self.path.parent)
        os.close(open_privately(str(self.path), os.O_RDWR | os.O_CREAT))
        kept = [keep_from_others(Path(f"{self.path}{each}")) for each in COMPANIONS]
        if not all(kept):
            folder = shlex.quote(str(self.path.parent))
            logger.warning(
                "other users of this machine can read the prompts and secrets in %s, whose files"
                " are not ours to change: chmod 700 %s",
                self.path,
                folder,
            )

    def identity(self) -> FileIdentity | None:
        """Return that of the file which is there now; None where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return FileIdentity(found.st_dev, found.st_ino)

    def url_for(self, url: URL) -> URL:
        """Return the URL by which it is opened only if it is there."""
        name = f"file:{quote(str(self.path.absolute()))}"
        return url.set(database=name, query={"mode": "rw", "uri": "true"})
