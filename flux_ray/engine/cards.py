"""The GPU cards that a plan may be made for, with what of each a program can really use."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """`usable_bytes` is what CUDA reports as the card's total, less than its name says.

    Without FP8 units (CUDA capability 8.9) FP8 weights are unpacked before each product; without
    NVLink more than two tensor ranks wait longer for each other than they compute.
    """

    name: str
    usable_bytes: int
    has_fp8_units: bool
    has_nvlink: bool


# GiB as PyTorch's out-of-memory messages give the total capacity: the lowest of several reports.
_ROWS = (
    ("b200-180gb", 178.35, True, True),
    ("h200-141gb", 139.72, True, True),
    ("h100-80gb", 79.10, True, True),
    ("a100-80gb", 79.10, False, True),
    ("l40s-48gb", 44.34, True, False),
    ("a100-40gb", 39.38, False, True),
    ("rtx5090-32gb", 31.34, True, False),
    ("rtx3090-24gb", 23.56, False, False),
    ("rtx4090-24gb", 23.52, True, False),
    ("l4-24gb", 22.03, True, False),
    ("a10g-24gb", 22.03, False, False),
    ("rtx4060-8gb", 7.60, True, False),
)
CARDS = {name: Card(name, int(gib * GIB), fp8, nvlink) for name, gib, fp8, nvlink in _ROWS}


def card_for(name: str) -> Card:
    """The row of a card; ValueError names the ones there are."""
    try:
        return CARDS[name]
    except KeyError:
        raise ValueError(f"no card named {name!r}; known cards: {', '.join(CARDS)}") from None
