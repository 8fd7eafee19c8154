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


class Row(NamedTuple):
    """What one key used through one gateway in one day of UTC, counted from the epoch."""

    gateway: str
    key: str
    day: int
    use: Use


class Usage:
    """Rows that only ever grow: of two that tell of the same, the larger is the newer.

    So they may be told twice, late, and by whoever has them, and nothing is counted twice.
    """

    def __init__(self) -> None:
        # By key first: a request asks for those of one.
        self._uses: dict[str, dict[tuple[str, int], Use]] = {}

    def add(self, gateway: str, key: str, use: Use, now: float) -> None:
        """The gateway's own row grows."""
        uses = self._uses.setdefault(key, {})
        name = (gateway, day_of(now))
        uses[name] = uses.get(name, Use()) + use

    def merge(self, rows: Iterable[Row]) -> None:
        """Learn what others know."""
        for row in rows:
            uses = self._uses.setdefault(row.key, {})
            known = uses.get((row.gateway, row.day), Use())
            uses[row.gateway, row.day] = Use(
                max(known.gpu_seconds, row.use.gpu_seconds),
                max(known.megapixels, row.use.megapixels),
            )

    def rows(self) -> tuple[Row, ...]:
        """All that is known."""
        return tuple(row for key in self._uses for row in self.rows_of(key))

    def rows_of(self, key: str) -> tuple[Row, ...]:
        """All that is known of one key."""
        uses = self._uses.get(key, {})
        return tuple(Row(gateway, key, day, use) for (gateway, day), use in uses.items())

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
