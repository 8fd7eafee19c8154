"""Who gives way when a ticket arrives that does not fit, and how long one that does will wait."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from operator import attrgetter

from flux_ray.router.queue.forecast import (
    NEVER,
    SAME_S,
    QueueEntry,
    capacity_curve,
    free_times,
    level,
    play,
)
from flux_ray.router.queue.slots import Slots
from flux_ray.router.queue.sums import SortedSums

# Longer lines are taken as a fluid: on as few slots as make that coarse, they outlast deadlines.
MAX_PLAYED = 64
# Larger tickets that are tried in the newcomer's stead.
MAX_TRIED = 8

Line = SortedSums[QueueEntry]
key_of = attrgetter("key")


def give_way(
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
