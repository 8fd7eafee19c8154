"""Autoscaling: how many replicas a tier should have, within the GPUs that the tiers share."""
