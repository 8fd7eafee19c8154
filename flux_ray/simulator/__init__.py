"""The fleet in simulated time: the router's own objects over replicas that only pass time."""
