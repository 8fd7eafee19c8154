"""Decide how many replicas each tier should have, within the GPUs that the tiers share."""
