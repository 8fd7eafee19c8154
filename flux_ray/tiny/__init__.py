"""The embedded model, small enough for tests and laptops, with all that it takes to make it again.

It has all parts of a FLUX.2 klein, with 4.3 million parameters, and generates coloured shapes.
Serving needs only `CHECKPOINT`; the modules here train the model and measure it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
