"""The work that was asked for, as the scaling policies are told of it."""

from collections import deque

from flux_ray.router.ledger.messages import SubmitRequest

# A client that was refused or left, and comes back within this time, asks for the same work.
REMEMBERED_S = 600.0
Name = tuple[str, str, str | float]


class Arrivals:
    """Sum the replica seconds that were asked for, by tier: each piece of work once.

    A request that ends undone is remembered for 10 minutes. If the same work is asked for meanwhile
    it is not counted again: a client came back as told, a job was put back, or a replica died. Work
    without a name is recognized by its key and price.
    """

    def __init__(self) -> None:
        self._total_s: dict[str, float] = {}
        self._undone: dict[Name, deque[float]] = {}
        self._order: deque[tuple[float, Name]] = deque()

    def count(self, submission: SubmitRequest, now: float, *, is_counted: bool = False) -> bool:
        """Count new work; return whether it is new. `is_counted`: an earlier ledger counted it."""
        self._forget(now)
        times = self._undone.get(name_of(submission))
        if times:
            times.popleft()
            return False
        if is_counted:
            return False
        self._total_s[submission.tier] = self._total_s.get(submission.tier, 0.0) + submission.cost_s
        return True

    def put_back(self, submission: SubmitRequest, now: float) -> None:
        """Remember a request that has ended undone."""
        name = name_of(submission)
        self._undone.setdefault(name, deque()).append(now)
        self._order.append((now, name))

    def total_s(self, tier: str) -> float:
        """Return the replica seconds counted so far."""
        return self._total_s.get(tier, 0.0)

    def _forget(self, now: float) -> None:
        while self._order and now - self._order[0][0] > REMEMBERED_S:
            at, name = self._order.popleft()
            times = self._undone.get(name, deque())
            if times and times[0] <= at:
                times.popleft()
            if not times:
                self._undone.pop(name, None)


def name_of(submission: SubmitRequest) -> Name:
    """Return what identifies the work that a request asks for."""
    return submission.tier, submission.key, submission.work or submission.cost_s
