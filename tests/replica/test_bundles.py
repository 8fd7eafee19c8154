"""What a replica asks of the cluster."""

from flux_ray.config import TierArgs
from flux_ray.replica.group import bundles_for


def test_one_bundle_a_rank() -> None:
    args = TierArgs(tier="tiny", device="cuda", num_cpus=2)
    assert bundles_for(args, num_ranks=3) == [{"CPU": 2.0, "GPU": 1.0}] * 3


def test_a_laptop_needs_no_gpu() -> None:
    assert bundles_for(TierArgs(tier="tiny", device="cpu", num_cpus=0.5)) == [{"CPU": 0.5}]
