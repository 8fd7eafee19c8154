"""Record the arrivals of a live cluster as a trace, and read traces for the simulator.

A trace has one JSON object per line: a request's arrival, shape and deadline, without its prompt
and images. `Recorder` writes on a thread of its own, and to a bounded size, so that recording
never delays a request.
"""

import json
import logging
import math
import queue
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux_ray.catalog import tier_for
from flux_ray.errors import UnknownTier
from flux_ray.private_files import open_privately
from flux_ray.request import ImageRequest

logger = logging.getLogger("ray.serve")

NUMBERS = ("at_s", "deadline_s")
# The integer fields, with the least value that makes sense.
LEAST = {"width": 1, "height": 1, "steps": 1, "references": 0, "images": 1, "forwards": 1}
KEYS = frozenset({*NUMBERS, *LEAST, "tier", "key"})
MAX_BYTES = 256 * 2**20
MAX_WAITING = 10_000
CLOSE_TIMEOUT_S = 5.0


class BadTrace(ValueError):
    """A line of a trace is invalid; the message names the key."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """An entry of a trace: what decides a request's cost, and when it arrived.

    `at_s`: seconds since the trace began. `deadline_s`: seconds after that; None is the tier's own.
    `key`: any text that tells callers apart, for fairness. `forwards`: those of each step.
    """

    at_s: float
    tier: str
    width: int
    height: int
    steps: int
    references: int = 0
    images: int = 1
    deadline_s: float | None = None
    key: str = ""
    forwards: int = 1


def traced(
    request: ImageRequest, at_s: float, deadline_s: float | None = None, key: str = ""
) -> TracedRequest:
    """Return the trace entry of a real request, without its prompt and images."""
    return TracedRequest(
        at_s=at_s,
        tier=request.tier,
        width=request.width,
        height=request.height,
        # Those that `strength` leaves out cost nothing.
        steps=request.num_steps_made,
        references=len(request.references),
        images=request.num_images,
        deadline_s=deadline_s,
        key=key,
        forwards=request.num_forwards,
    )


def line_of(entry: TracedRequest) -> str:
    """Return the entry as JSON, without a line end; None as a deadline is left out."""
    fields = {name: value for name, value in asdict(entry).items() if value is not None}
    return json.dumps(fields, separators=(",", ":"))


def parse_line(text: str) -> TracedRequest:
    """Read one line; missing values are the tier's defaults. BadTrace names a wrong key."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BadTrace(f"no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadTrace("not a JSON object")
    unknown = sorted(fields.keys() - KEYS)
    if unknown:
        raise BadTrace(f"unknown key {unknown[0]!r}; known keys: {', '.join(sorted(KEYS))}")
    return entry_of(fields)


def entry_of(fields: dict[str, Any]) -> TracedRequest:
    """Check the value of every field and return the entry; BadTrace names a wrong one."""
    try:
        tier = tier_for(text_in(fields, "tier"))
    except UnknownTier as error:
        raise BadTrace(f"tier: {error}") from None
    side = tier.default_side
    deadline_s = None if fields.get("deadline_s") is None else number_in(fields, "deadline_s")
    if deadline_s == 0:
        raise BadTrace("deadline_s: 0 is in the past")
    return TracedRequest(
        at_s=number_in(fields, "at_s"),
        tier=tier.name,
        width=count_in(fields, "width", side),
        height=count_in(fields, "height", side),
        steps=count_in(fields, "steps", tier.num_steps),
        references=count_in(fields, "references", 0),
        images=count_in(fields, "images", 1),
        deadline_s=deadline_s,
        key=text_in(fields, "key") if "key" in fields else "",
        forwards=count_in(fields, "forwards", tier.num_forwards),
    )


def text_in(fields: dict[str, Any], name: str) -> str:
    """Return a field that must be a string; BadTrace if it is missing or no string."""
    value = value_in(fields, name)
    if not isinstance(value, str):
        raise BadTrace(f"{name}: {value!r} is no text")
    return value


def number_in(fields: dict[str, Any], name: str) -> float:
    """Return a field in seconds; BadTrace unless it is finite and not negative."""
    value = value_in(fields, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadTrace(f"{name}: {value!r} is no number of seconds")
    if value < 0:
        raise BadTrace(f"{name}: {value!r} is negative")
    return float(value)


def count_in(fields: dict[str, Any], name: str, default: int) -> int:
    """Return an integer field or its default; BadTrace if it is below the least allowed."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < LEAST[name]:
        raise BadTrace(f"{name}: {value!r} is no whole number from {LEAST[name]} on")
    return value


def value_in(fields: dict[str, Any], name: str) -> Any:
    """Return the value of a field; BadTrace if it is missing."""
    if name not in fields:
        raise BadTrace(f"{name} is missing")
    return fields[name]


class Recorder:
    """A trace file that gets a line for each request; no failure here reaches a request.

    A file of `max_bytes` is renamed to `<path>.1`, replacing the one before, so the disk never
    holds more than two. Entries that come faster than the disk takes them, or that it refuses, are
    dropped and counted in `num_dropped`. `record` and `close` are called from the gateway's event
    loop; a thread of its own writes.
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
        """Record a request that came at `at_s` with `deadline_s` left; never wait or raise."""
        try:
            self._lines.put_nowait(line_of(traced(request, at_s, deadline_s, key)))
        except queue.Full:
            self.num_dropped += 1
        except Exception:
            self.num_dropped += 1
            logger.exception("a request could not be recorded in %s", self.path)

    def close(self) -> None:
        """Write what is waiting, and give up after CLOSE_TIMEOUT_S."""
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
