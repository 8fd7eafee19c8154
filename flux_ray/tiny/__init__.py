"""The embedded model: a FLUX.2 klein of 4.3 M parameters that generates shapes, and its recipe."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
