"""The keys that are let in now: read again when their file changes, kept when it is broken."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from flux_ray.auth.key_file import read_keys, stamp_of
from flux_ray.auth.keys import Key, Keyring

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
# A disk that hangs is to hold up nobody for longer.
PATIENCE_S = 2.0


class KeyWatch:
    """Looks at the file at most once a second, when somebody asks: no later request is let in by
    what was true more than a second ago. ValueError if the file cannot be used at the start: a
    gateway that let nobody in would look alive.
    """

    def __init__(self, path: Path, classes: Collection[str], period_s: float = PERIOD_S) -> None:
        self._path = path
        self._classes = classes
        self._period_s = period_s
        self._stamp = stamp_of(path)
        self._keyring = self._read()
        self._looked_at = time.monotonic()
        self._look: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Key | None:
        """The live key with that secret."""
        await self._keep_up()
        return self._keyring.find(secret, datetime.now(UTC))

    async def _keep_up(self) -> None:
        if self._look is None or self._look.done():
            if time.monotonic() - self._looked_at < self._period_s:
                return
            # In an empty context: it is no part of the request that happens to be the first.
            self._look = asyncio.get_running_loop().create_task(
                self._read_again(), context=contextvars.Context()
            )
        await asyncio.wait((self._look,), timeout=PATIENCE_S)

    async def _read_again(self) -> None:
        stamp = await asyncio.to_thread(stamp_of, self._path)
        self._looked_at = time.monotonic()
        if stamp == self._stamp:
            return
        # Also of a broken file: one line in the log is enough.
        self._stamp = stamp
        try:
            self._keyring = await asyncio.to_thread(self._read)
        except ValueError as error:
            logger.error("the keys stay as they are: %s", error)
        else:
            logger.info("the keys were read again from %s", self._path)

    def _read(self) -> Keyring:
        file = read_keys(self._path)
        file.check_classes(self._classes)
        return Keyring(file)
