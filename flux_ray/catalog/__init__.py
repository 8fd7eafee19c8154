"""The catalogue: the tiers that can be served, the GPUs, and the work of each tier's stages.

Each is a table in code, with one row for each tier or GPU.
"""
