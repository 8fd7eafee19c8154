"""The small checkpoint in FLUX.2 dev's layout, which the engine's tests have too."""

from tests.engine.conftest import small_dev

__all__ = ["small_dev"]
