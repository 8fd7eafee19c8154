"""A sorted list that also tells the sum of all amounts before an entry, in microseconds."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import Generic, TypeVar

Key = tuple[float, int]
Item = TypeVar("Item")

# A block beyond this is cut in two. It is about the square root of the longest list expected, which
# balances the work in one block against that over all blocks.
MAX_BLOCK = 200


class Block(Generic[Item]):
    """A run of neighbouring entries: keys, amounts and items, with total and peak amount."""

    __slots__ = ("amounts", "items", "keys", "peak", "total")

    def __init__(self, keys: list[Key], amounts: list[float], items: list[Item]) -> None:
        self.keys = keys
        self.amounts = amounts
        self.items = items
        self.total = sum(amounts)
        self.peak = max(amounts)


class SortedSums(Generic[Item]):
    """A list of items with amounts, sorted by key: a time, and a number that makes it unique.

    Every operation costs a scan of one block and a sum over the blocks: microseconds for tens of
    thousands of items. The sums of an empty list are exactly zero, whatever was added and removed.
    """

    def __init__(self) -> None:
        self.blocks: list[Block[Item]] = []
        self._lasts: list[Key] = []
        self._totals: list[float] = []
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return sum(self._lengths)

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(block.items for block in self.blocks)

    @property
    def total(self) -> float:
        """The sum of all amounts."""
        return sum(self._totals)

    def amounts(self) -> Iterator[float]:
        """Iterate over all amounts, in order of the keys."""
        return chain.from_iterable(block.amounts for block in self.blocks)

    def first(self) -> Item | None:
        """Return the item of the smallest key, None if there is none."""
        return self.blocks[0].items[0] if self.blocks else None

    def add(self, key: Key, amount: float, item: Item) -> None:
        """Insert an item; its key must be new."""
        if not self.blocks:
            self._insert_block(0, Block([key], [amount], [item]))
            return
        place = min(bisect_left(self._lasts, key), len(self.blocks) - 1)
        block = self.blocks[place]
        inside = bisect_left(block.keys, key)
        block.keys.insert(inside, key)
        block.amounts.insert(inside, amount)
        block.items.insert(inside, item)
        block.total += amount
        block.peak = max(block.peak, amount)
        if len(block.keys) > MAX_BLOCK:
            self._cut(place)
        else:
            self._note(place)

    def remove(self, key: Key) -> Item:
        """Remove the item of this key and return it; raise KeyError if there is none."""
        place = bisect_left(self._lasts, key)
        block = self.blocks[place] if place < len(self.blocks) else None
        inside = bisect_left(block.keys, key) if block else 0
        if block is None or block.keys[inside] != key:
            raise KeyError(key)
        del block.keys[inside]
        amount = block.amounts.pop(inside)
        item = block.items.pop(inside)
        if not block.keys:
            self._delete_block(place)
            return item
        block.total -= amount
        if amount >= block.peak:
            block.peak = max(block.amounts)
        self._note(place)
        return item

    def before(self, key: Key) -> tuple[int, float]:
        """Return how many keys are smaller, and the sum of their amounts."""
        place = bisect_left(self._lasts, key)
        number, total = sum(self._lengths[:place]), sum(self._totals[:place])
        if place < len(self.blocks):
            block = self.blocks[place]
            inside = bisect_left(block.keys, key)
            number += inside
            total += sum(block.amounts[:inside])
        return number, total

    def largest_until(self, key: Key) -> Item | None:
        """Return the item of the largest amount among keys up to this one; of equals the last."""
        place = bisect_left(self._lasts, key)
        best = max(range(place), key=lambda number: (self.blocks[number].peak, number), default=-1)
        peak = self.blocks[best].peak if best >= 0 else 0.0
        if place < len(self.blocks):
            block = self.blocks[place]
            head = block.amounts[: bisect_right(block.keys, key)]
            if head and max(head) >= peak:
                return block.items[len(head) - 1 - head[::-1].index(max(head))]
        if best < 0:
            return None
        block = self.blocks[best]
        return block.items[len(block.amounts) - 1 - block.amounts[::-1].index(peak)]

    def _cut(self, place: int) -> None:
        block = self.blocks[place]
        half = len(block.keys) // 2
        self._delete_block(place)
        for part in (slice(half, None), slice(None, half)):
            self._insert_block(
                place, Block(block.keys[part], block.amounts[part], block.items[part])
            )

    def _insert_block(self, place: int, block: Block[Item]) -> None:
        self.blocks.insert(place, block)
        self._lasts.insert(place, block.keys[-1])
        self._totals.insert(place, block.total)
        self._lengths.insert(place, len(block.keys))

    def _delete_block(self, place: int) -> None:
        for parallel in (self.blocks, self._lasts, self._totals, self._lengths):
            del parallel[place]

    def _note(self, place: int) -> None:
        block = self.blocks[place]
        self._lasts[place] = block.keys[-1]
        self._totals[place] = block.total
        self._lengths[place] = len(block.keys)
