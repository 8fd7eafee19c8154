"""Typed configuration: the `args` of a Serve config file for tiers, the gateway, and jobs."""

from flux_ray.config.gateway import Alias, Fetching, GatewayArgs, JobArgs, Limits, Uploads, Webhooks
from flux_ray.config.tier import (
    COLD_START_S,
    PROXY_CALLBACK,
    READ_WITH_H11,
    Args,
    Autoscaling,
    Lora,
    Parallel,
    Quantization,
    TierArgs,
    keep_collectives_local,
    reads_with_h11,
    use_gpu,
)

__all__ = [
    "COLD_START_S",
    "PROXY_CALLBACK",
    "READ_WITH_H11",
    "Alias",
    "Args",
    "Autoscaling",
    "Fetching",
    "GatewayArgs",
    "JobArgs",
    "Limits",
    "Lora",
    "Parallel",
    "Quantization",
    "TierArgs",
    "Uploads",
    "Webhooks",
    "keep_collectives_local",
    "reads_with_h11",
    "use_gpu",
]
