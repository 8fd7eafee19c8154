"""Prices: what a request takes on a replica of its tier, by a roofline and by what was measured."""
