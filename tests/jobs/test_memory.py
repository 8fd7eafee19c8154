"""A gateway that is handed many jobs with large references at once stays within its budget."""

import pytest

from flux_ray.config.gateway import Limits
from tests.jobs.memory_gauge import Load, measure

LIMITS = Limits(max_held_bytes=600_000_000)
ALLOWED_BYTES = 400_000_000


@pytest.mark.slow
async def test_a_crowd_of_large_jobs_stays_within_the_budget(tmp_path):
    """Raw they would be 1.4 GB; the whole of it is `make bench NAME=job_memory`."""
    seen = await measure(Load(num_jobs=12, num_references=2), tmp_path, LIMITS)
    assert seen.num_ready == 12
    assert seen.peak_bytes <= LIMITS.max_held_bytes + ALLOWED_BYTES
