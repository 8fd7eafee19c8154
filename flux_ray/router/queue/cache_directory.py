"""Which replicas were lately given a prompt or a reference, and so hold what was made of it."""

from collections import OrderedDict

from flux_ray.router.queue.entry import QueuedRequest

MAX_NAMES = 50_000
MAX_HOLDERS = 16


class CacheDirectory:
    """A guess from the grants; the least recently granted names are forgotten."""

    def __init__(self) -> None:
        self._holders: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def note(self, ticket: QueuedRequest, replica: str) -> None:
        """The ticket went there."""
        for name, _ in ticket.affinity:
            holders = self._holders.setdefault(name, OrderedDict())
            self._holders.move_to_end(name)
            holders[replica] = None
            holders.move_to_end(replica)
            if len(holders) > MAX_HOLDERS:
                holders.popitem(last=False)
        while len(self._holders) > MAX_NAMES:
            self._holders.popitem(last=False)

    def savings(self, ticket: QueuedRequest) -> dict[str, float]:
        """Seconds saved, by replica."""
        saved_s: dict[str, float] = {}
        for name, seconds in ticket.affinity:
            for replica in self._holders.get(name, ()):
                saved_s[replica] = saved_s.get(replica, 0.0) + seconds
        return saved_s
