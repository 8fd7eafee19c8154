"""How much work was asked for: each piece once, however often it is refused or put back."""

from collections import deque

from flux_ray.router.ledger.messages import SubmitRequest

# Who was refused, or left, and comes back within that time asks for the same work.
REMEMBERED_S = 600.0
Name = tuple[str, str, str | float]


class Arrivals:
    """The GPU seconds that arrived, by tier.

    A request that ends undone is remembered for a while. One for the same work that comes then is
    the same request once more: a client that came back as it was told, a job that was put back, a
    second try after a replica died. Where the work has no name, it is known by its key and price.
    """

    def __init__(self) -> None:
        self._total_s: dict[str, float] = {}
        self._undone: dict[Name, deque[float]] = {}
        self._order: deque[tuple[float, Name]] = deque()

    def count(self, offer: SubmitRequest, now: float, *, is_counted: bool = False) -> bool:
        """Whether the work is new; if so it is counted. `is_counted`: it was, by whoever asks."""
        self._forget(now)
        times = self._undone.get(name_of(offer))
        if times:
            times.popleft()
            return False
        if is_counted:
            return False
        self._total_s[offer.tier] = self._total_s.get(offer.tier, 0.0) + offer.cost_s
        return True

    def put_back(self, offer: SubmitRequest, now: float) -> None:
        """The request has ended undone."""
        name = name_of(offer)
        self._undone.setdefault(name, deque()).append(now)
        self._order.append((now, name))

    def total_s(self, tier: str) -> float:
        """All that was counted."""
        return self._total_s.get(tier, 0.0)

    def _forget(self, now: float) -> None:
        while self._order and now - self._order[0][0] > REMEMBERED_S:
            at, name = self._order.popleft()
            times = self._undone.get(name, deque())
            if times and times[0] <= at:
                times.popleft()
            if not times:
                self._undone.pop(name, None)


def name_of(offer: SubmitRequest) -> Name:
    """Of the work."""
    return offer.tier, offer.key, offer.work or offer.cost_s
