"""The model names of BFL's own API, and which tiers here do the work of each.

Clients of that API name a model by its path. Most of these models are not public; the tier of the
same kind of work stands for them only where the operator says so.
"""

from collections.abc import Collection

# The best first.
STAND_INS: dict[str, tuple[str, ...]] = {
    "flux-dev": ("flux-1-dev",),
    "flux-pro": ("flux-1-pro", "flux-1-dev"),
    "flux-pro-1.1": ("flux-1-pro", "flux-1-dev"),
    "flux-pro-1.1-ultra": ("flux-1-pro", "flux-1-dev"),
    "flux-kontext-pro": ("flux-1-kontext-dev",),
    "flux-kontext-max": ("flux-1-kontext-dev",),
    "flux-pro-1.0-fill": ("flux-1-fill-dev",),
    "flux-pro-1.0-depth": ("flux-1-depth-dev",),
    "flux-pro-1.0-canny": ("flux-1-canny-dev",),
    "flux-2-flex": ("flux-2-pro", "flux-2-dev"),
    "flux-2-pro-preview": ("flux-2-pro",),
    "flux-2-klein-9b-preview": ("flux-2-klein-9b-kv",),
}


def stand_ins_for(tiers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return BFL's names that can be served by `tiers`, each with those that stand for it."""
    found = {
        name: tuple(tier for tier in stand_ins if tier in tiers)
        for name, stand_ins in STAND_INS.items()
    }
    return {name: stand_ins for name, stand_ins in found.items() if stand_ins}
