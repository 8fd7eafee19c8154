"""Rows of what API keys used in a day, which gateways and ledger exchange and merge."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

DAY_S = 86_400


@dataclass(frozen=True)
class Use:
    """An amount used: GPU seconds and megapixels."""

    gpu_seconds: float = 0.0
    megapixels: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        return Use(self.gpu_seconds + other.gpu_seconds, self.megapixels + other.megapixels)


# What identifies a row: gateway, key and day.
Name = tuple[str, str, int]


class UsageRow(NamedTuple):
    """The use of one key through one gateway on one day of UTC, counted from the epoch."""

    gateway: str
    key: str
    day: int
    use: Use

    @property
    def name(self) -> Name:
        """The gateway, key and day that this is the only row of."""
        return self.gateway, self.key, self.day


class Usage:
    """A set of rows whose values only grow: of two versions of a row, the larger is the newer.

    So rows may arrive twice, late, and from any process that has them, and nothing counts twice.
    """

    def __init__(self) -> None:
        # By key first, because a request asks for the rows of one key.
        self._uses: dict[str, dict[tuple[str, int], Use]] = {}

    def add(self, gateway: str, key: str, use: Use, now: float) -> Name:
        """Add to the gateway's own row of today, and return the row's name."""
        uses = self._uses.setdefault(key, {})
        name = (gateway, day_of(now))
        uses[name] = uses.get(name, Use()) + use
        return gateway, key, day_of(now)

    def merge(self, rows: Iterable[UsageRow]) -> set[Name]:
        """Merge rows of other processes; return the names of those that were new or larger."""
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
        """Return the rows of these names, as far as they are known."""
        return tuple(
            UsageRow(gateway, key, day, self._uses[key][gateway, day])
            for gateway, key, day in names
            if (gateway, day) in self._uses.get(key, {})
        )

    def rows(self) -> tuple[UsageRow, ...]:
        """Return all rows of all keys."""
        return tuple(row for key in self._uses for row in self.rows_of(key))

    def rows_of(self, key: str) -> tuple[UsageRow, ...]:
        """Return all rows of one key."""
        uses = self._uses.get(key, {})
        return tuple(UsageRow(gateway, key, day, use) for (gateway, day), use in uses.items())

    def of(self, key: str, now: float) -> Use:
        """Return what the key used today, through all gateways."""
        total = Use()
        for (_, day), use in self._uses.get(key, {}).items():
            if day == day_of(now):
                total += use
        return total

    def forget(self, now: float) -> None:
        """Drop the rows of days before yesterday; yesterday stays, because clocks differ."""
        for key, uses in list(self._uses.items()):
            kept = {name: use for name, use in uses.items() if name[1] >= day_of(now) - 1}
            if kept:
                self._uses[key] = kept
            else:
                del self._uses[key]


def day_of(now: float) -> int:
    """Return the day of UTC, counted from the epoch."""
    return int(now // DAY_S)
