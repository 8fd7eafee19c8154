"""The embedded models, a FLUX.2 klein and a FLUX.1 Kontext that draw shapes, and their recipe."""

from pathlib import Path

KLEIN_CHECKPOINT = Path(__file__).parent / "klein" / "checkpoint"
KONTEXT_CHECKPOINT = Path(__file__).parent / "kontext" / "checkpoint"
