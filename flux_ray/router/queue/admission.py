"""Decide whether a new request fits into a queue, who is evicted for it, and how long it waits.

A queue of up to MAX_SIMULATED requests is simulated start by start (`simulate_starts`). A longer
one is treated as a fluid: `water_level` tells when its total work will have been begun.
`EstimateError` tells how far off the prices are, so that a request which is only nearly too late is
not refused for a wrong one.

What each part is worth (`make bench NAME=ablation`, 1500 requests in each of 50 cells of load,
deadline and error of the prices): points of attainment lost without it, and what a request costs.

| without | worst cell | mean | cells over 0.5 | ms a request |
|---|---|---|---|---|
| nothing | 0 | 0 | 0 | 0.38 |
| evictions | 17.3 | 2.9 | 22 | 0.28 |
| `EstimateError` | 22.7 | 2.1 | 14 | 0.41 |
| the fluid, from 64 requests on | 0 | 0.0 | 1, gained | 3.85 |
| `Shares` (one key floods, 50th cell) | 88.7 | 1.8 | 1 | 0.10 |
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter
from typing import NamedTuple

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.slots import Slots
from flux_ray.router.queue.sums import Key, SortedSums

# Times that are this close count as the same, because sums of floats are not exact.
SAME_S = 1e-6
NEVER = float("inf")
# (until, n, s): for times t up to `until`, the slots can have done n * t - s seconds of work by t.
Piece = tuple[float, int, float]
# Above so many busy slots they are counted by the block, which is coarser but fast enough.
MAX_SINGLE = 400


class Forecast(NamedTuple):
    """The prospects of a request that arrived now: refused, or started after `wait_s`."""

    wait_s: float
    is_refused: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class QueueEntry:
    """A request in the queue, ordered by `due`; after `latest_start` it would miss its deadline."""

    request: QueuedRequest
    due: float
    latest_start: float
    number: int

    @property
    def key(self) -> Key:
        """The sort key in the queue: `due`, then order of arrival."""
        return self.due, self.number


def free_times(slots: Slots, num: int, now: float) -> list[float]:
    """Return when the first `num` slots will be free, ascending; fewer if there are fewer slots."""
    times = [now] * min(slots.num_idle, num)
    for slot in slots.busy:
        if len(times) >= num:
            break
        times.append(max(slot.free_at, now))
    return times


def simulate_starts(line: Iterable[QueueEntry], free: list[float]) -> list[float]:
    """Simulate the queue, and return when each of its requests will start, in order.

    The time is NEVER for one that would be refused at its turn. `free` is a heap with at least one
    time at which a slot is free; afterwards it has the times at which slots are free again.
    """
    starts = []
    for entry in line:
        at = free[0]
        if at > entry.latest_start + SAME_S:
            starts.append(NEVER)
            continue
        starts.append(at)
        heapq.heapreplace(free, at + entry.request.cost_s)
    return starts


def capacity_curve(slots: Slots, now: float) -> list[Piece]:
    """Return the work that the slots can have done by any time, as pieces of a linear function.

    Overdue slots count as free from now on. With more than MAX_SINGLE busy slots it is a lower
    bound: the slots of a block then count only from when the last of them is free.
    """
    busy = slots.busy
    num = slots.num_idle
    taken = num * now
    curve = []
    if len(busy) <= MAX_SINGLE:
        for free_at in busy.amounts():
            at = max(free_at, now)
            curve.append((at, num, taken))
            num += 1
            taken += at
    else:
        for block in busy.blocks:
            curve.append((block.keys[-1][0], num, taken))
            num += len(block.keys)
            if block.keys[0][0] >= now:
                taken += block.total
            else:
                taken += sum(max(free_at, now) for free_at in block.amounts)
    curve.append((NEVER, num, taken))
    return curve


def water_level(curve: Iterable[Piece], work_s: float, now: float) -> float:
    """Return when a slot is free again once `work_s` has been started; `now` without slots.

    This is the level of water poured over the slots: no order of list scheduling keeps all of them
    busy longer (Graham 1966).
    """
    for until, num, taken in curve:
        if num and num * until - taken >= work_s:
            return max((work_s + taken) / num, now)
    return now


# The number of past requests that the estimate is made of.
WINDOW = 200
# A request is given up only if it would have to be this many standard deviations faster than its
# price to be in time.
HOPED_DEVIATIONS = 1.5
LEAST_SHARE = 0.3


class EstimateError:
    """The mean and deviation of log(seconds taken / seconds estimated), over past requests.

    A request that is too late by its estimate may really be in time. While estimates are exact,
    such requests are refused; the more the estimates err, the more of them are tried.
    """

    def __init__(self) -> None:
        self._num = 0
        self._mean = self._variance = 0.0

    @property
    def least_share(self) -> float:
        """The least share of its estimate that a request may take; 1 while nothing is known."""
        if self._num < 2:
            return 1.0
        hoped = math.exp(self._mean - HOPED_DEVIATIONS * math.sqrt(self._variance))
        return min(max(hoped, LEAST_SHARE), 1.0)

    def note(self, taken_s: float, estimated_s: float) -> None:
        """Learn from a finished request."""
        if taken_s <= 0 or estimated_s <= 0:
            return
        self._num = min(self._num + 1, WINDOW)
        error = math.log(taken_s / estimated_s) - self._mean
        self._mean += error / self._num
        self._variance += (error * error - self._variance) / self._num


# Longer queues are treated as a fluid. That is coarse only with few slots, and there a queue of
# this length waits beyond any deadline anyway.
MAX_SIMULATED = 64
# How many longer requests are considered for eviction in the newcomer's stead.
MAX_TRIED = 8

Line = SortedSums[QueueEntry]
key_of = attrgetter("key")


def choose_evictions(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> list[QueueEntry]:
    """Return the requests to evict so that `new` can join `line` behind `ahead`.

    The list is empty if all still start in time. Otherwise the longest request is evicted without
    which all do, as Moore (1968) keeps most jobs in time; of equally long ones the newcomer. None
    is evicted for a longer one. If `new` itself must go, the list holds it alone. Requests in the
    line that are late anyway are not considered.
    """
    if sum(len(other) for other in ahead) + len(line) > MAX_SIMULATED:
        return _choose_evictions_in_fluid(new, ahead, line, slots, now)
    free = free_times(slots, sum(map(len, ahead)) + len(line) + 2, now)
    for other in ahead:
        simulate_starts(other, free)
    queued = list(line)
    late_anyway = frozenset(_late(queued, free, frozenset()))
    queued.insert(bisect_left(queued, new.key, key=key_of), new)
    leaving: list[QueueEntry] = []
    while late := _late(queued, free, late_anyway):
        head = queued[: queued.index(late[0]) + 1]
        victim = _victim(head, new, free, late_anyway)
        if victim is new:
            return [new]
        leaving.append(victim)
        queued.remove(victim)
    return leaving


def wait_of(new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float) -> float:
    """Return the seconds until `new` would start if it joined `line` behind `ahead`."""
    num_before, before_s = line.before(new.key)
    num_before += sum(len(other) for other in ahead)
    if num_before > MAX_SIMULATED:
        work_s = before_s + sum(other.total for other in ahead)
        return water_level(capacity_curve(slots, now), work_s, now) - now
    free = free_times(slots, num_before + 1, now)
    for other in ahead:
        simulate_starts(other, free)
    simulate_starts(takewhile(lambda entry: entry.key < new.key, line), free)
    return free[0] - now


def _late(
    queued: list[QueueEntry], free: list[float], late_anyway: frozenset[QueueEntry]
) -> list[QueueEntry]:
    starts = simulate_starts(queued, free.copy())
    return [
        entry
        for entry, start in zip(queued, starts, strict=True)
        if start == NEVER and entry not in late_anyway
    ]


def _victim(
    head: list[QueueEntry], new: QueueEntry, free: list[float], late_anyway: frozenset[QueueEntry]
) -> QueueEntry:
    longer = [entry for entry in head if entry.request.cost_s > new.request.cost_s]
    longer.sort(key=lambda entry: entry.request.cost_s, reverse=True)
    for candidate in longer[:MAX_TRIED]:
        rest = [entry for entry in head if entry is not candidate]
        if candidate not in late_anyway and not _late(rest, free, late_anyway):
            return candidate
    return new


def _choose_evictions_in_fluid(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> list[QueueEntry]:
    late = _first_late_in_fluid(new, ahead, line, slots, now)
    if late is None:
        return []
    longest = line.largest_until(late.key)
    if longest is None or longest.request.cost_s <= new.request.cost_s:
        return [new]
    return [longest]


def _first_late_in_fluid(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> QueueEntry | None:
    """Return the first request that would start too late with `new` in the line.

    Only `new` and the last request of each block are looked at.
    """
    before_s = sum(other.total for other in ahead)
    curve = capacity_curve(slots, now)
    if water_level(curve, before_s + line.before(new.key)[1], now) > new.latest_start + SAME_S:
        return new
    pieces = iter(curve)
    until, num, taken = next(pieces)
    work_s = before_s + new.request.cost_s
    for block in line.blocks:
        work_s += block.total
        last = block.items[-1]
        if last.key < new.key:
            continue
        # The same as level(), in one pass over the curve: the work before the last one only grows.
        ahead_s = work_s - block.amounts[-1]
        while not num or num * until - taken < ahead_s:
            until, num, taken = next(pieces)
        if (ahead_s + taken) / num > last.latest_start + SAME_S:
            return last
    return None
