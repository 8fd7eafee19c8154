"""Who gives way when a ticket arrives that does not fit, and how long one that does will wait.

When waiting tickets will start: played through for a short line, as a fluid for a long one.

How far off the prices are: what a request may take at the least, judged by those before it.
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

# Two times this close are the same: sums of floats are not exact.
SAME_S = 1e-6
NEVER = float("inf")
# (until, n, s): up to that time the slots can have done n * t - s seconds of work by the time t.
Piece = tuple[float, int, float]
# With more busy slots they are counted by the block.
MAX_SINGLE = 400


class Forecast(NamedTuple):
    """What would become of a request that came now: how long it would wait, if it were taken."""

    wait_s: float
    is_refused: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class QueueEntry:
    """A ticket in line, which `due` orders. After `latest_start` it is hopeless."""

    ticket: QueuedRequest
    due: float
    latest_start: float
    number: int

    @property
    def key(self) -> Key:
        """Its place in the line."""
        return self.due, self.number


def free_times(slots: Slots, num: int, now: float) -> list[float]:
    """When the first `num` slots will be free, ascending; fewer if there are fewer."""
    times = [now] * min(slots.num_idle, num)
    for slot in slots.busy:
        if len(times) >= num:
            break
        times.append(max(slot.free_at, now))
    return times


def play(line: Iterable[QueueEntry], free: list[float]) -> list[float]:
    """When each of the line will start, in its order, on slots that are free then.

    NEVER for one that would be refused at its turn. `free` is a heap with at least one time, and is
    left as it is at the end.
    """
    starts = []
    for waiting in line:
        at = free[0]
        if at > waiting.latest_start + SAME_S:
            starts.append(NEVER)
            continue
        starts.append(at)
        heapq.heapreplace(free, at + waiting.ticket.cost_s)
    return starts


def capacity_curve(slots: Slots, now: float) -> list[Piece]:
    """What the slots can do by any time, overdue ones counting as free from now on.

    With many busy slots from below: those of a block then count from when the last of them is free.
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


def level(curve: Iterable[Piece], work_s: float, now: float) -> float:
    """By when some slot is free for more after so much work has been begun, in whatever order.

    The time at which the water stands when the work is poured over the slots: no order of list
    scheduling leaves all slots busy longer (Graham 1966). Now without slots.
    """
    for until, num, taken in curve:
        if num and num * until - taken >= work_s:
            return max((work_s + taken) / num, now)
    return now


# Requests that the estimate looks back on.
WINDOW = 200
# Below so many standard deviations a request takes so little too seldom to hope for it.
HOPED_DEVIATIONS = 1.5
LEAST_SHARE = 0.3


class EstimateError:
    """Mean and deviation of the logarithm of seconds taken over seconds estimated.

    Whoever cannot be in time by the estimate may be so in truth. While estimates are exact, nobody
    is given that hope; the more they err, the more is tried that seems too late.
    """

    def __init__(self) -> None:
        self._num = 0
        self._mean = self._variance = 0.0

    @property
    def least_share(self) -> float:
        """Of its estimate, what a request may hope to take; 1 as long as nothing is known."""
        if self._num < 2:
            return 1.0
        hoped = math.exp(self._mean - HOPED_DEVIATIONS * math.sqrt(self._variance))
        return min(max(hoped, LEAST_SHARE), 1.0)

    def note(self, taken_s: float, estimated_s: float) -> None:
        """A request is done."""
        if taken_s <= 0 or estimated_s <= 0:
            return
        self._num = min(self._num + 1, WINDOW)
        error = math.log(taken_s / estimated_s) - self._mean
        self._mean += error / self._num
        self._variance += (error * error - self._variance) / self._num


# Longer lines are taken as a fluid: on as few slots as make that coarse, they outlast deadlines.
MAX_PLAYED = 64
# Larger tickets that are tried in the newcomer's stead.
MAX_TRIED = 8

Line = SortedSums[QueueEntry]
key_of = attrgetter("key")


def choose_evictions(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> list[QueueEntry]:
    """Those who must leave so that `new` can join the line behind `ahead`; maybe itself, alone.

    Nobody, if everyone still starts in time. Otherwise the longest ticket without which everyone
    does, as Moore (1968) keeps most jobs in time; of equals the newcomer. Nobody leaves for a
    longer one. Those in the line who are late anyway have no say.
    """
    if sum(len(other) for other in ahead) + len(line) > MAX_PLAYED:
        return _give_way_in_fluid(new, ahead, line, slots, now)
    free = free_times(slots, sum(map(len, ahead)) + len(line) + 2, now)
    for other in ahead:
        play(other, free)
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
    """Seconds until `new` would begin, if it joined the line behind `ahead`."""
    num_before, before_s = line.before(new.key)
    num_before += sum(len(other) for other in ahead)
    if num_before > MAX_PLAYED:
        work_s = before_s + sum(other.total for other in ahead)
        return level(capacity_curve(slots, now), work_s, now) - now
    free = free_times(slots, num_before + 1, now)
    for other in ahead:
        play(other, free)
    play(takewhile(lambda waiting: waiting.key < new.key, line), free)
    return free[0] - now


def _late(
    queued: list[QueueEntry], free: list[float], late_anyway: frozenset[QueueEntry]
) -> list[QueueEntry]:
    starts = play(queued, free.copy())
    return [
        waiting
        for waiting, start in zip(queued, starts, strict=True)
        if start == NEVER and waiting not in late_anyway
    ]


def _victim(
    head: list[QueueEntry], new: QueueEntry, free: list[float], late_anyway: frozenset[QueueEntry]
) -> QueueEntry:
    longer = [waiting for waiting in head if waiting.ticket.cost_s > new.ticket.cost_s]
    longer.sort(key=lambda waiting: waiting.ticket.cost_s, reverse=True)
    for candidate in longer[:MAX_TRIED]:
        rest = [waiting for waiting in head if waiting is not candidate]
        if candidate not in late_anyway and not _late(rest, free, late_anyway):
            return candidate
    return new


def _give_way_in_fluid(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> list[QueueEntry]:
    crowded = _first_crowded(new, ahead, line, slots, now)
    if crowded is None:
        return []
    longest = line.largest_until(crowded.key)
    if longest is None or longest.ticket.cost_s <= new.ticket.cost_s:
        return [new]
    return [longest]


def _first_crowded(
    new: QueueEntry, ahead: Sequence[Line], line: Line, slots: Slots, now: float
) -> QueueEntry | None:
    """Who first would start too late; looked at are the newcomer and the end of each block."""
    before_s = sum(other.total for other in ahead)
    curve = capacity_curve(slots, now)
    if level(curve, before_s + line.before(new.key)[1], now) > new.latest_start + SAME_S:
        return new
    pieces = iter(curve)
    until, num, taken = next(pieces)
    work_s = before_s + new.ticket.cost_s
    for block in line.blocks:
        work_s += block.total
        last = block.items[-1]
        if last.key < new.key:
            continue
        # As level() has it: the work before the last one only grows.
        ahead_s = work_s - block.amounts[-1]
        while not num or num * until - taken < ahead_s:
            until, num, taken = next(pieces)
        if (ahead_s + taken) / num > last.latest_start + SAME_S:
            return last
    return None
