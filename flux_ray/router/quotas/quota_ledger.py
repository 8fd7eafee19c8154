"""Decide, in the ledger's process, whether a request is within the limits of its key."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from flux_ray.router.quotas.usage import DAY_S, Name, Usage, UsageRow, Use

MINUTE_S = 60.0
# A gateway reports every two seconds. One that has been silent for so long is dead.
SILENCE_S = 10.0


@dataclass(frozen=True)
class QuotaLimits:
    """The limits of one key: at once, in any 60 seconds, in a day of UTC; None is no limit."""

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    gpu_seconds_per_day: float | None = None
    megapixels_per_day: float | None = None


UNLIMITED = QuotaLimits()


@dataclass(frozen=True)
class UsageEntry:
    """A running request on a tier: what it uses by its price, and `cost_s` in replica seconds.

    One request may run on several tiers, and counts as one.
    """

    request_id: str
    tier: str
    key: str
    use: Use
    cost_s: float


class LimitExceeded(NamedTuple):
    """Why a key has to wait, and how long: for ever if the request alone exceeds the limit.

    `name` is the field of QuotaLimits that it exceeds.
    """

    reason: str
    retry_after_s: float
    limit: float
    left: float
    is_daily: bool = False
    name: str = ""


class LimitStatus(NamedTuple):
    """How much of a limit is left to a key, and in how many seconds it will have more."""

    limit: float
    left: float
    reset_s: float


class UsageSync(NamedTuple):
    """The rows that a gateway does not know yet, and whether it must send all of its own again."""

    rows: tuple[UsageRow, ...]
    tell_all: bool


# A request on a tier, by its id and the tier; and what it uses, with the time since when.
EntryName = tuple[str, str]
RunningEntry = tuple[UsageEntry, float]


@dataclass
class GatewayUsage:
    """The ledger's knowledge of one gateway: its running requests, and the rows to send to it.

    `entries` has the requests by id and tier, each with the time since when; `of_keys` names those
    of each key, so that one key's limits cost nothing for the requests of all others.
    """

    heard_at: float
    entries: dict[EntryName, RunningEntry] = field(default_factory=dict)
    of_keys: dict[str, dict[EntryName, None]] = field(default_factory=dict)
    news: set[Name] = field(default_factory=set)
    has_shared: bool = False

    def add(self, entry: UsageEntry, since: float) -> None:
        """Write down a running request; one of this name is replaced."""
        name = (entry.request_id, entry.tier)
        self.remove(name)
        self.entries[name] = (entry, since)
        self.of_keys.setdefault(entry.key, {})[name] = None

    def remove(self, name: EntryName) -> None:
        """Remove a request that has ended; ignore an unknown one."""
        if name not in self.entries:
            return
        entry, _ = self.entries.pop(name)
        del self.of_keys[entry.key][name]
        if not self.of_keys[entry.key]:
            del self.of_keys[entry.key]

    def replace(self, entries: Iterable[UsageEntry], now: float) -> None:
        """Keep exactly these requests; one that is new runs since `now`."""
        before, self.entries, self.of_keys = self.entries, {}, {}
        for entry in entries:
            _, since = before.get((entry.request_id, entry.tier), (entry, now))
            self.add(entry, since)

    def of(self, key: str) -> Iterator[RunningEntry]:
        """Yield the running requests of one key."""
        return (self.entries[name] for name in self.of_keys.get(key, ()))


class QuotaLedger:
    """The counts of all gateways, kept in the ledger's process and used from its event loop.

    Every method is told the time, of a monotonic clock. `date` returns seconds since the epoch;
    only limits of a day go by it.

    The number of requests at once is exact while the ledger lives. Requests per minute are those
    admitted during the last 60 seconds, at any moment. A day is one of UTC; a running request
    counts by its price until it is known what it took.

    After a loss of the ledger, gateways send the new one their running requests within two seconds,
    and with every request what its key used today. So of the day only that is lost which a gateway
    spent that died within two seconds of the ledger. The requests of the last minute are forgotten.
    """

    def __init__(self, date: Callable[[], float] = time.time) -> None:
        self._date = date
        self._gateways: dict[str, GatewayUsage] = {}
        # The requests of the last minute by key, the oldest first, each with its time.
        self._recent: dict[str, dict[str, float]] = {}
        self._usage = Usage()

    def enter(
        self,
        gateway: str,
        entry: UsageEntry,
        allowance: QuotaLimits,
        rows: Iterable[UsageRow],
        now: float,
    ) -> LimitExceeded | None:
        """Count a request, or return which limit it exceeds; `rows` are the key's of today."""
        self._merge(gateway, rows)
        session = self._session_of(gateway, now)
        exceeded = (
            self._too_many(entry, allowance.max_concurrent, now)
            or self._too_often(entry, allowance.requests_per_minute, now)
            or self._too_much(entry, allowance, now)
        )
        if exceeded is None:
            session.add(entry, now)
            if allowance.requests_per_minute is not None:
                # setdefault: the same request on another tier counts once.
                self._recent.setdefault(entry.key, {}).setdefault(entry.request_id, now)
        return exceeded

    def hold(self, gateway: str, entry: UsageEntry, rows: Iterable[UsageRow], now: float) -> None:
        """Write down a request that was let in before, whatever its key may have."""
        self._merge(gateway, rows)
        session = self._session_of(gateway, now)
        if (entry.request_id, entry.tier) not in session.entries:
            session.add(entry, now)

    def admit(
        self,
        gateway: str,
        entry: UsageEntry,
        allowance: QuotaLimits,
        rows: Iterable[UsageRow],
        now: float,
    ) -> LimitExceeded | LimitStatus | None:
        """Count a request as enter() does, and return how its key stands afterwards.

        None means that the key has no limit of a minute or of a day.
        """
        exceeded = self.enter(gateway, entry, allowance, rows, now)
        return exceeded or self.standing(entry.key, allowance, now)

    def standing(self, key: str, allowance: QuotaLimits, now: float) -> LimitStatus | None:
        """Return the limit of a minute or a day of which the smallest part is left.

        The number of requests at once is left out: when its caller reads it, the request is over.
        """
        standings = []
        if (limit := allowance.requests_per_minute) is not None:
            recent = self._last_minute(key, now)
            oldest = next(iter(recent.values()), now)
            left = max(0, limit - len(recent))
            standings.append(LimitStatus(limit, left, oldest + MINUTE_S - now))
        spent = self._spent(key, now)
        for limit_a_day, had in (
            (allowance.gpu_seconds_per_day, spent.gpu_seconds),
            (allowance.megapixels_per_day, spent.megapixels),
        ):
            if limit_a_day is not None:
                left_today = max(0.0, limit_a_day - had)
                standings.append(LimitStatus(limit_a_day, left_today, self._rest_of_day_s()))
        return min(standings, key=lambda each: each.left / each.limit, default=None)

    def leave(self, gateway: str, request_id: str, tier: str, rows: Iterable[UsageRow]) -> None:
        """Remove a request that has ended; `rows` has what it took."""
        self._merge(gateway, rows)
        if gateway in self._gateways:
            self._gateways[gateway].remove((request_id, tier))

    def share(
        self,
        gateway: str,
        entries: Iterable[UsageEntry],
        rows: Iterable[UsageRow],
        now: float,
        *,
        tells_all: bool = True,
    ) -> UsageSync:
        """Take in a gateway's report, and return what it does not know yet.

        `entries` are all requests that it has running. `rows` are all that it knows of today if
        `tells_all`, else what is new since its last report.
        """
        self._forget(now)
        session = self._session_of(gateway, now)
        session.replace(entries, now)
        session.has_shared |= tells_all
        self._merge(gateway, rows)
        # A gateway that sends all may have lost an answer, so it is sent all.
        news = self._usage.rows() if tells_all else self._usage.rows_named(session.news)
        session.news = set()
        return UsageSync(news, not session.has_shared)

    def _merge(self, gateway: str, rows: Iterable[UsageRow]) -> None:
        news = self._usage.merge(rows)
        for name, session in self._gateways.items():
            if name != gateway:
                session.news |= news

    def _forget(self, now: float) -> None:
        self._usage.forget(self._date())
        for silent in [g for g, each in self._gateways.items() if is_silent(each, now)]:
            del self._gateways[silent]
        for key in list(self._recent):
            if not self._last_minute(key, now):
                del self._recent[key]

    def _session_of(self, gateway: str, now: float) -> GatewayUsage:
        session = self._gateways.setdefault(gateway, GatewayUsage(now))
        session.heard_at = now
        return session

    def _running(self, key: str, now: float) -> list[RunningEntry]:
        live = (each for each in self._gateways.values() if not is_silent(each, now))
        return [found for session in live for found in session.of(key)]

    def _too_many(self, entry: UsageEntry, limit: int | None, now: float) -> LimitExceeded | None:
        if limit is None:
            return None
        others = [
            (other, since)
            for other, since in self._running(entry.key, now)
            if other.request_id != entry.request_id
        ]
        if len({other.request_id for other, _ in others}) < limit:
            return None
        first_end_s = min(since + other.cost_s for other, since in others) - now
        reason = f"this key may have {limit} requests at once"
        return LimitExceeded(reason, first_end_s, limit, 0, name="max_concurrent")

    def _too_often(self, entry: UsageEntry, limit: int | None, now: float) -> LimitExceeded | None:
        if limit is None:
            return None
        recent = self._last_minute(entry.key, now)
        if len(recent) < limit or entry.request_id in recent:
            return None
        # If the limit was lowered, more than one request has to become older than a minute.
        came_at = next(islice(recent.values(), len(recent) - limit, None))
        next_s = came_at + MINUTE_S - now
        reason = f"this key may make {limit} requests a minute"
        return LimitExceeded(reason, next_s, limit, 0, name="requests_per_minute")

    def _too_much(
        self, entry: UsageEntry, allowance: QuotaLimits, now: float
    ) -> LimitExceeded | None:
        spent = self._spent(entry.key, now, but=(entry.request_id, entry.tier))
        for name, had, wanted, unit in (
            ("gpu_seconds_per_day", spent.gpu_seconds, entry.use.gpu_seconds, "GPU second"),
            ("megapixels_per_day", spent.megapixels, entry.use.megapixels, "megapixel"),
        ):
            limit: float | None = getattr(allowance, name)
            if limit is not None and had + wanted > limit:
                wait_s = math.inf if wanted > limit else self._rest_of_day_s()
                reason = f"this key may use {limit:.6g} {unit}s a day; this takes {wanted:.3g}"
                left = max(0.0, limit - had)
                return LimitExceeded(reason, wait_s, limit, left, is_daily=True, name=name)
        return None

    def _spent(self, key: str, now: float, but: tuple[str, str] | None = None) -> Use:
        """Return what the key used today, running requests by their price, without `but`."""
        spent = self._usage.of(key, self._date())
        for entry, _ in self._running(key, now):
            if (entry.request_id, entry.tier) != but:
                spent += entry.use
        return spent

    def _rest_of_day_s(self) -> float:
        return DAY_S - self._date() % DAY_S

    def _last_minute(self, key: str, now: float) -> dict[str, float]:
        recent = self._recent.get(key, {})
        while recent:
            oldest = next(iter(recent))
            if recent[oldest] > now - MINUTE_S:
                break
            del recent[oldest]
        return recent


def is_silent(session: GatewayUsage, now: float) -> bool:
    """Return whether the gateway is taken for dead, and its clients gone with it."""
    return now - session.heard_at > SILENCE_S
