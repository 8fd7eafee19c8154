"""What is sold and on what it runs.

The tiers, the GPUs, and the work of each stage, one row each.
"""
