"""Typed configuration: the `args` of a Serve config file for tiers, the gateway, and jobs."""
