"""Price requests in replica seconds: a roofline estimate, corrected by what replicas measured."""

from flux_ray.router.pricing.config_check import check_possible, drain_timeout_s
from flux_ray.router.pricing.cost import Cost, ReplicaSpec, RequestShape, price, work_at
from flux_ray.router.pricing.cost_model import CostModel, Observation, Snapshot, affinity_of, merged

__all__ = [
    "Cost",
    "CostModel",
    "Observation",
    "ReplicaSpec",
    "RequestShape",
    "Snapshot",
    "affinity_of",
    "check_possible",
    "drain_timeout_s",
    "merged",
    "price",
    "work_at",
]
