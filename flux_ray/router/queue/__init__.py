"""Queue the requests of a tier: admit them, order them, assign them to replicas. Pure objects."""
