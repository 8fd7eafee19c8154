"""API keys: their classes, the file that holds them, and how changes of it take effect."""

from flux_ray.auth.keys import (
    Key,
    KeyClass,
    KeyWatch,
    change_keys,
    hash_secret,
    new_key,
    read_keys,
    with_key,
    without_key,
)

__all__ = [
    "Key",
    "KeyClass",
    "KeyWatch",
    "change_keys",
    "hash_secret",
    "new_key",
    "read_keys",
    "with_key",
    "without_key",
]
