"""What fits: the bytes that a deployment needs on each GPU, and its cheapest layouts.

Knows no Ray.
"""
