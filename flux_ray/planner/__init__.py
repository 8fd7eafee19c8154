"""Count the bytes that a deployment needs on each GPU, and find its cheapest placements.

`flux-ray plan` calls it; no weights are read, and nothing here knows Ray.
"""
