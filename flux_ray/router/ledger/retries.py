"""Where requests that may come again are drawn, or were a while ago: a gateway may die under them.

Its client or a balancer sends the request again, to any gateway, which asks here who has it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

# A client that comes again does so within seconds; replicas keep the images no longer either.
KEPT_S = 300.0
# Some hundred bytes each.
MAX_KEPT = 20_000


@dataclass(frozen=True)
class Retry:
    """By what a request is known when it comes again: a name that no other caller can say.

    `fingerprint`: of all that it asks for. `is_lasting`: its images are the same once it has been
    answered, too; else only what was never answered is found.
    """

    name: str
    fingerprint: str
    is_lasting: bool = True

    @property
    def run(self) -> str:
        """What a replica calls it: never the same for another caller or another request."""
        return f"{self.name} {self.fingerprint}"


class Place(NamedTuple):
    """A replica that was granted a request, by which ticket, and with which seed."""

    ticket_id: str
    tier: str
    replica: str
    fingerprint: str
    seed: int


class Places:
    """By name, where requests are. Every method is told the time.

    A request that its gateway ended undone is found no more. One that was done is if it is lasting,
    and one of a gateway that fell silent is in any case: its replica goes on drawing.
    """

    def __init__(self) -> None:
        # The last that was granted is the last.
        self._places: dict[str, dict[str, Place]] = {}
        self._live: dict[str, Retry] = {}
        # Until when, by ticket; in that order.
        self._kept: dict[str, tuple[float, str]] = {}

    def grant(self, retry: Retry, place: Place) -> None:
        """A replica draws it from now on."""
        self._kept.pop(place.ticket_id, None)
        self._live[place.ticket_id] = retry
        self._places.setdefault(retry.name, {})[place.ticket_id] = place

    def end(self, ticket_id: str, now: float, *, is_done: bool) -> None:
        """Its gateway says that it is over; unknown ones are ignored."""
        retry = self._live.pop(ticket_id, None)
        if retry is None:
            return
        if is_done and retry.is_lasting:
            self._keep(ticket_id, retry, now)
        else:
            self._drop(ticket_id, retry.name)

    def abandon(self, ticket_ids: Iterable[str], now: float) -> None:
        """Their gateway is silent: nobody hears what becomes of them."""
        for ticket_id in ticket_ids:
            retry = self._live.pop(ticket_id, None)
            if retry is not None:
                self._keep(ticket_id, retry, now)

    def find(self, name: str, now: float) -> tuple[Place, ...]:
        """Where it may be, the latest first."""
        self._forget(now)
        return tuple(reversed(self._places.get(name, {}).values()))

    def _keep(self, ticket_id: str, retry: Retry, now: float) -> None:
        self._kept[ticket_id] = (now + KEPT_S, retry.name)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._kept:
            ticket_id = next(iter(self._kept))
            until, name = self._kept[ticket_id]
            if until > now and len(self._kept) <= MAX_KEPT:
                return
            del self._kept[ticket_id]
            self._drop(ticket_id, name)

    def _drop(self, ticket_id: str, name: str) -> None:
        places = self._places[name]
        del places[ticket_id]
        if not places:
            del self._places[name]
