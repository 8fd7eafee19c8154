"""Typed configuration: what a Serve config file may say of tiers, of the gateway and of jobs."""
