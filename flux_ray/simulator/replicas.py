"""The replicas of one simulated tier: starting, up, draining, dead, and what each is working on."""

import heapq
import itertools
from dataclasses import dataclass, field


@dataclass(slots=True)
class Replica:
    """One that is up. `free_at` is a heap: when each slot has done all that it was given."""

    name: str
    free_at: list[float]
    running: dict[str, float] = field(default_factory=dict)
    is_draining: bool = False

    def start(self, ticket_id: str, seconds: float, now: float) -> tuple[float, float]:
        """Work off a grant as soon as a slot is free; returned are its start and its end."""
        begin = max(now, self.free_at[0])
        end = begin + seconds
        heapq.heapreplace(self.free_at, end)
        self.running[ticket_id] = end
        return begin, end


class Replicas:
    """By name. Counts GPUs from the order of a replica until it is gone."""

    def __init__(self, tier: str, num_slots: int) -> None:
        self._names = (f"{tier}-{number}" for number in itertools.count())
        self._num_slots = num_slots
        self.up: dict[str, Replica] = {}
        self.draining: dict[str, Replica] = {}
        self.starting: dict[str, float] = {}
        self.held_s = 0.0
        self._counted_until = 0.0

    @property
    def num_held(self) -> int:
        """All that hold GPUs."""
        return len(self.up) + len(self.draining) + len(self.starting)

    def pass_time(self, until: float) -> None:
        """Replica seconds are counted up to then."""
        if until > self._counted_until:
            self.held_s += self.num_held * (until - self._counted_until)
            self._counted_until = until

    def order(self, ready_at: float) -> str:
        """A new one, in its cold start."""
        name = next(self._names)
        self.starting[name] = ready_at
        return name

    def ready(self, name: str) -> bool:
        """Its cold start is over; False if it was called off."""
        if self.starting.pop(name, None) is None:
            return False
        self.up[name] = Replica(name, [0.0] * self._num_slots)
        return True

    def call_off(self) -> str | None:
        """The one that would be ready last, if any is starting."""
        if not self.starting:
            return None
        name = max(self.starting, key=lambda name: (self.starting[name], name))
        del self.starting[name]
        return name

    def drain(self, number: int) -> list[str]:
        """That many: those that will be free first."""
        chosen = heapq.nsmallest(
            number, self.up.values(), key=lambda replica: (max(replica.free_at), replica.name)
        )
        for replica in chosen:
            del self.up[replica.name]
            if replica.running:
                replica.is_draining = True
                self.draining[replica.name] = replica
        return [replica.name for replica in chosen]

    def lose(self, number: int) -> Replica | None:
        """The one of that index dies."""
        if not self.up:
            return None
        name = list(self.up)[number % len(self.up)]
        return self.up.pop(name)

    def done(self, replica: Replica, ticket_id: str) -> None:
        """A ticket is done; a draining replica without any goes."""
        del replica.running[ticket_id]
        if replica.is_draining and not replica.running:
            del self.draining[replica.name]
