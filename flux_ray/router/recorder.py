"""Records the arrivals of a live cluster as a trace, off the request's path and within a bound."""

import logging
import queue
import threading
from pathlib import Path

from flux_ray.private_files import open_privately
from flux_ray.request import ImageRequest
from flux_ray.router.trace import line_of, traced

logger = logging.getLogger("ray.serve")

MAX_BYTES = 256 * 2**20
MAX_WAITING = 10_000
CLOSE_TIMEOUT_S = 5.0


class Recorder:
    """Appends a line a request to `path`; nothing that goes wrong here reaches a request.

    A file of `max_bytes` is set aside as `<path>.1`, in the place of the one before: the disk never
    holds more than two of them. Entries that come faster than the disk takes them, or that it
    refuses, are dropped and counted in `num_dropped`.
    """

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, max_waiting: int = MAX_WAITING
    ) -> None:
        self.path = path
        self.num_dropped = 0
        self._max_bytes = max_bytes
        self._lines: queue.Queue[str | None] = queue.Queue(max_waiting)
        self._writer = threading.Thread(target=self._write, name="trace-recorder", daemon=True)
        self._writer.start()

    def record(
        self, request: ImageRequest, at_s: float, deadline_s: float | None, key: str = ""
    ) -> None:
        """Note a request that came at `at_s` with `deadline_s` left; never waits or raises."""
        try:
            self._lines.put_nowait(line_of(traced(request, at_s, deadline_s, key)))
        except queue.Full:
            self.num_dropped += 1
        except Exception:
            self.num_dropped += 1
            logger.exception("a request could not be recorded in %s", self.path)

    def close(self) -> None:
        """Write what is waiting, for at most some seconds."""
        try:
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._writer.join(CLOSE_TIMEOUT_S)

    def _write(self) -> None:
        is_failing = False
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
                is_failing = False
            except OSError as error:
                self.num_dropped += 1
                if not is_failing:
                    logger.warning("requests are not recorded in %s: %s", self.path, error)
                is_failing = True

    def _append(self, line: str) -> None:
        data = f"{line}\n".encode()
        if self._num_bytes() + len(data) > self._max_bytes:
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        with open(self.path, "ab", opener=open_privately) as file:
            file.write(data)

    def _num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0
