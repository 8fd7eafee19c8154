"""What keys may have, and what they have had: the books of all gateways' limits.

What keys used in a day, as gateways tell each other: each adds to its own rows only.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

DAY_S = 86_400


@dataclass(frozen=True)
class Use:
    """What requests take."""

    gpu_seconds: float = 0.0
    megapixels: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        return Use(self.gpu_seconds + other.gpu_seconds, self.megapixels + other.megapixels)


# Gateway, key and day.
Name = tuple[str, str, int]


class UsageRow(NamedTuple):
    """What one key used through one gateway in one day of UTC, counted from the epoch."""

    gateway: str
    key: str
    day: int
    use: Use

    @property
    def name(self) -> Name:
        """What there is one row of."""
        return self.gateway, self.key, self.day


class Usage:
    """Rows that only ever grow: of two that tell of the same, the larger is the newer.

    So they may be told twice, late, and by whoever has them, and nothing is counted twice.
    """

    def __init__(self) -> None:
        # By key first: a request asks for those of one.
        self._uses: dict[str, dict[tuple[str, int], Use]] = {}

    def add(self, gateway: str, key: str, use: Use, now: float) -> Name:
        """The gateway's own row grows: its name."""
        uses = self._uses.setdefault(key, {})
        name = (gateway, day_of(now))
        uses[name] = uses.get(name, Use()) + use
        return gateway, key, day_of(now)

    def merge(self, rows: Iterable[UsageRow]) -> set[Name]:
        """Learn what others know: the rows that were not known so."""
        news = set()
        for row in rows:
            uses = self._uses.setdefault(row.key, {})
            known = uses.get((row.gateway, row.day), Use())
            larger = Use(
                max(known.gpu_seconds, row.use.gpu_seconds),
                max(known.megapixels, row.use.megapixels),
            )
            if larger != known:
                uses[row.gateway, row.day] = larger
                news.add(row.name)
        return news

    def rows_named(self, names: Iterable[Name]) -> tuple[UsageRow, ...]:
        """Those of them that are known."""
        return tuple(
            UsageRow(gateway, key, day, self._uses[key][gateway, day])
            for gateway, key, day in names
            if (gateway, day) in self._uses.get(key, {})
        )

    def rows(self) -> tuple[UsageRow, ...]:
        """All that is known."""
        return tuple(row for key in self._uses for row in self.rows_of(key))

    def rows_of(self, key: str) -> tuple[UsageRow, ...]:
        """All that is known of one key."""
        uses = self._uses.get(key, {})
        return tuple(UsageRow(gateway, key, day, use) for (gateway, day), use in uses.items())

    def of(self, key: str, now: float) -> Use:
        """What the key used today, through all gateways."""
        total = Use()
        for (_, day), use in self._uses.get(key, {}).items():
            if day == day_of(now):
                total += use
        return total

    def forget(self, now: float) -> None:
        """The days before yesterday: clocks differ."""
        for key, uses in list(self._uses.items()):
            kept = {name: use for name, use in uses.items() if name[1] >= day_of(now) - 1}
            if kept:
                self._uses[key] = kept
            else:
                del self._uses[key]


def day_of(now: float) -> int:
    """Of UTC."""
    return int(now // DAY_S)


MINUTE_S = 60.0
# A gateway tells of itself every two seconds. One that is silent for so long is dead.
SILENCE_S = 10.0


@dataclass(frozen=True)
class QuotaLimits:
    """What one key may have at once, in any 60 seconds, and in a day of UTC; None is no limit."""

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    gpu_seconds_per_day: float | None = None
    megapixels_per_day: float | None = None


UNLIMITED = QuotaLimits()


@dataclass(frozen=True)
class UsageEntry:
    """A request on a tier: what it will use by its price, and in how many seconds of a replica.

    The same request may be on several tiers, and counts as one.
    """

    request_id: str
    tier: str
    key: str
    use: Use
    cost_s: float


class LimitExceeded(NamedTuple):
    """Why a key has to wait, and how long; for ever if the request alone is more than it may have.

    Of `limit`, so much is `left`; `name` is that of the allowance's field.
    """

    reason: str
    retry_after_s: float
    limit: float
    left: float
    is_daily: bool = False
    name: str = ""


class LimitStatus(NamedTuple):
    """Of a limit, how much is left to a key, and in how many seconds it has more."""

    limit: float
    left: float
    reset_s: float


class UsageSync(NamedTuple):
    """The rows that a gateway does not know yet; and whether it is to tell of all again."""

    rows: tuple[UsageRow, ...]
    tell_all: bool


@dataclass
class GatewayUsage:
    """What a gateway has in hand, by request and tier, each since when; and what is news to it."""

    heard_at: float
    entries: dict[tuple[str, str], tuple[UsageEntry, float]] = field(default_factory=dict)
    news: set[Name] = field(default_factory=set)
    has_shared: bool = False


class QuotaLedger:
    """Counts for all gateways. Every method is told the time, of a clock that nobody sets.

    `date`: seconds since the epoch. Only what a key may have in a day goes by it.

    What a key has at once is exact while the ledger lives. Requests a minute are those let in
    during the last 60 seconds, whichever 60 those are; a day is one of UTC, and what is in hand
    counts by its price until it is known what it took.

    After a loss the gateways tell again, within two seconds, what they have in hand, and with every
    request what its key had today. So of the day only what a gateway spent is lost that died within
    two seconds of the ledger. The requests of the last minute are forgotten.
    """

    def __init__(self, date: Callable[[], float] = time.time) -> None:
        self._date = date
        self._gateways: dict[str, GatewayUsage] = {}
        # By key: the requests of the last minute, the oldest first, each with its time.
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
        """Write down a request, or say why not. `rows`: what the gateway knows of the key's day."""
        self._merge(gateway, rows)
        present = self._heard(gateway, now)
        denial = (
            self._too_many(entry, allowance.max_concurrent, now)
            or self._too_often(entry, allowance.requests_per_minute, now)
            or self._too_much(entry, allowance, now)
        )
        if denial is None:
            present.entries[entry.request_id, entry.tier] = (entry, now)
            if allowance.requests_per_minute is not None:
                # Not again for another tier.
                self._recent.setdefault(entry.key, {}).setdefault(entry.request_id, now)
        return denial

    def hold(self, gateway: str, entry: UsageEntry, rows: Iterable[UsageRow], now: float) -> None:
        """Write down a request that was let in before, whatever its key may have."""
        self._merge(gateway, rows)
        entries = self._heard(gateway, now).entries
        entries.setdefault((entry.request_id, entry.tier), (entry, now))

    def admit(
        self,
        gateway: str,
        entry: UsageEntry,
        allowance: QuotaLimits,
        rows: Iterable[UsageRow],
        now: float,
    ) -> LimitExceeded | LimitStatus | None:
        """As enter; with it, how its key stands. None: by no limit of a minute or of a day."""
        denial = self.enter(gateway, entry, allowance, rows, now)
        return denial or self.standing(entry.key, allowance, now)

    def standing(self, key: str, allowance: QuotaLimits, now: float) -> LimitStatus | None:
        """By the limit of which the smallest part is left.

        What a key has at once is none of them: when it hears of it that request is over.
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
        """It has ended; in the gateway's rows is what it took."""
        self._merge(gateway, rows)
        if gateway in self._gateways:
            self._gateways[gateway].entries.pop((request_id, tier), None)

    def share(
        self,
        gateway: str,
        entries: Iterable[UsageEntry],
        rows: Iterable[UsageRow],
        now: float,
        *,
        tells_all: bool = True,
    ) -> UsageSync:
        """All that a gateway has in hand, and what it knows of today: all, or what is new."""
        self._forget(now)
        present = self._heard(gateway, now)
        before = present.entries
        present.entries = {}
        for entry in entries:
            name = (entry.request_id, entry.tier)
            present.entries[name] = before.get(name, (entry, now))
        present.has_shared |= tells_all
        self._merge(gateway, rows)
        # Who tells all may have lost an answer: it hears all.
        news = self._usage.rows() if tells_all else self._usage.rows_named(present.news)
        present.news = set()
        return UsageSync(news, not present.has_shared)

    def _merge(self, gateway: str, rows: Iterable[UsageRow]) -> None:
        news = self._usage.merge(rows)
        for name, present in self._gateways.items():
            if name != gateway:
                present.news |= news

    def _forget(self, now: float) -> None:
        self._usage.forget(self._date())
        for silent in [g for g, each in self._gateways.items() if is_silent(each, now)]:
            del self._gateways[silent]
        for key in list(self._recent):
            if not self._last_minute(key, now):
                del self._recent[key]

    def _heard(self, gateway: str, now: float) -> GatewayUsage:
        present = self._gateways.setdefault(gateway, GatewayUsage(now))
        present.heard_at = now
        return present

    def _in_hand(self, key: str, now: float) -> list[tuple[UsageEntry, float]]:
        return [
            (entry, since)
            for present in self._gateways.values()
            if not is_silent(present, now)
            for entry, since in present.entries.values()
            if entry.key == key
        ]

    def _too_many(self, entry: UsageEntry, limit: int | None, now: float) -> LimitExceeded | None:
        if limit is None:
            return None
        others = [
            (other, since)
            for other, since in self._in_hand(entry.key, now)
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
        # Of a limit that was lowered, more than one has to become old.
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
        """Today, with what is in hand at its price."""
        spent = self._usage.of(key, self._date())
        for entry, _ in self._in_hand(key, now):
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


def is_silent(present: GatewayUsage, now: float) -> bool:
    """Whether the gateway is dead, and its clients with it."""
    return now - present.heard_at > SILENCE_S
