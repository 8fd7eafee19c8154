"""The embedded model: its world, its recipe, its evaluation and its checkpoint."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
