"""The catalogue: the tiers that can be served, the GPUs, and the work of each tier's stages.

Each is a table in code, with one row for each tier or GPU.
"""

from flux_ray.catalog.bfl_names import stand_ins_for
from flux_ray.catalog.canvas import Canvas, ReferenceLimit, limited_size
from flux_ray.catalog.flops import (
    MAX_WHOLE_PIXELS,
    TOKEN_SIDE,
    WORKLOADS,
    scaled_size,
)
from flux_ray.catalog.gpus import CARDS, PROCESSOR, SPEEDS, Gpu, Speed, card_for, card_of, speed_for
from flux_ray.catalog.tiers import (
    ALL_EMBEDDED,
    EMBEDDED,
    EMBEDDED_KONTEXT,
    TIERS,
    Tier,
    tier_for,
)

__all__ = [
    "ALL_EMBEDDED",
    "CARDS",
    "EMBEDDED",
    "EMBEDDED_KONTEXT",
    "MAX_WHOLE_PIXELS",
    "PROCESSOR",
    "SPEEDS",
    "TIERS",
    "TOKEN_SIDE",
    "WORKLOADS",
    "Canvas",
    "Gpu",
    "ReferenceLimit",
    "Speed",
    "Tier",
    "card_for",
    "card_of",
    "limited_size",
    "scaled_size",
    "speed_for",
    "stand_ins_for",
    "tier_for",
]
