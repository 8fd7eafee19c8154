"""When waiting tickets will start: played through for a short line, as a fluid for a long one."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.slots import Slots
from flux_ray.router.queue.sums import Key

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
