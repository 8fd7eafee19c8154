"""The GPU cards that a plan may be made for, with what of each a program can really use."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """`usable_bytes` is what CUDA reports as the card's total, less than its name says.

    Without NVLink more than two tensor ranks wait longer for each other than they compute.
    """

    name: str
    usable_bytes: int
    has_nvlink: bool = False


# As PyTorch's out-of-memory messages give the total capacity; the lowest of several reports.
_ROWS = (
    ("b200-180gb", 178.35, True),
    ("h200-141gb", 139.72, True),
    ("h100-80gb", 79.10, True),
    ("a100-80gb", 79.10, True),
    ("a100-40gb", 39.38, True),
    ("l40s-48gb", 44.34, False),
    ("rtx5090-32gb", 31.36, False),
    ("l4-24gb", 22.03, False),
    ("a10g-24gb", 22.03, False),
    ("rtx4090-24gb", 23.52, False),
    ("rtx3090-24gb", 23.56, False),
    ("rtx4060-8gb", 7.60, False),
)
CARDS = {name: Card(name, int(gib * GIB), nvlink) for name, gib, nvlink in _ROWS}


def card_for(name: str) -> Card:
    """The row of a card; ValueError names the ones there are."""
    try:
        return CARDS[name]
    except KeyError:
        raise ValueError(f"no card named {name!r}; known cards: {', '.join(CARDS)}") from None
