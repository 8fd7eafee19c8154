"""Simulate a fleet: the router's own queue and scaler, over replicas that only let time pass."""
