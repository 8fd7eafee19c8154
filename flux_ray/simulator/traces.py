"""Trace files: JSON lines of arrivals in the order of time, read and written one by one."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from flux_ray.router.trace import BadTrace, TracedRequest, line_of, parse_line


def read_trace(path: Path) -> Iterator[TracedRequest]:
    """The entries, one at a time: a million of them need no memory.

    Of a folder those of all its files, as the gateways of a cluster recorded them, set aside or
    not. BadTrace names the line and the key that is wrong; arrivals must not go back in time.
    """
    if not path.is_dir():
        return read_file(path)
    files = sorted(path.glob("*.jsonl*"))
    if not files:
        raise BadTrace(f"{path} has no traces: *.jsonl")
    return heapq.merge(*map(read_file, files), key=attrgetter("at_s"))


def read_file(path: Path) -> Iterator[TracedRequest]:
    """Of one file."""
    last_s = 0.0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                entry = entry_at(path, number, line)
                if entry.at_s < last_s:
                    raise at_line(path, number, f"at_s: {entry.at_s:g} is before {last_s:g}")
                last_s = entry.at_s
                yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path} cannot be read: {error}") from None


def entry_at(path: Path, number: int, line: str) -> TracedRequest:
    """The entry of one line."""
    try:
        return parse_line(line)
    except BadTrace as error:
        raise at_line(path, number, str(error)) from None


def at_line(path: Path, number: int, reason: str) -> BadTrace:
    """The error that says where."""
    return BadTrace(f"{path} line {number}: {reason}")


def write_trace(path: Path, entries: Iterable[TracedRequest]) -> int:
    """Write the entries as they come; how many there were."""
    num_entries = 0
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(f"{line_of(entry)}\n")
            num_entries += 1
    return num_entries


def from_zero(entries: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
    """The same arrivals, the first at 0: what was recorded begins at the clock of its cluster."""
    first_s: float | None = None
    for entry in entries:
        first_s = entry.at_s if first_s is None else first_s
        yield replace(entry, at_s=entry.at_s - first_s)


def last_arrival_s(path: Path) -> float:
    """Seconds from the first arrival to the last; 0 for an empty trace. Reads all of it."""
    at_s = 0.0
    for entry in from_zero(read_trace(path)):
        at_s = entry.at_s
    return at_s
