"""What keys used in a day, as gateways tell each other: each adds to its own rows only."""

from collections.abc import Iterable
from dataclasses import dataclass
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
