"""The model: one adapter per family, from words and references to pixels. Knows no Ray, no HTTP."""
