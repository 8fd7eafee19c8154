"""A tier whose weights cannot be had fails in seconds, with one sentence in Serve's status."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import DEPLOYED, deploy, wait_until
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, serve_hub

GATED, ABSENT = "flux-2-dev", "flux-2-klein-4b"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve_hub({"model_index.json": b"{}"}) as hub:
        hub.is_gated = True
        yield hub


def application(tier: str, weights: str, env: dict[str, str]) -> dict[str, Any]:
    args = {"tier": tier, "weights": weights, "device": "cpu", "num_cpus": 0.01}
    return {
        "name": tier,
        "route_prefix": None,
        "import_path": "flux_ray.app:build_tier",
        "args": args,
        "runtime_env": {"env_vars": env},
    }


@pytest.mark.slow
@pytest.mark.usefixtures("address")
def test_a_start_says_at_once_what_it_lacks(hub: FakeHub, tmp_path: Path) -> None:
    from ray import serve

    before, changed = copy.deepcopy(DEPLOYED), copy.deepcopy(DEPLOYED)
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"}
    changed["applications"] += [
        application(GATED, f"{REPOSITORY}@{COMMIT}", env),
        application(ABSENT, "/no/such/folder", env),
    ]
    began = time.monotonic()
    deploy(changed)

    def have_failed() -> bool:
        statuses = serve.status().applications
        return all(
            tier in statuses and statuses[tier].status == "DEPLOY_FAILED"
            for tier in (GATED, ABSENT)
        )

    wait_until(have_failed, what="both have failed")
    print(f"both failed for good after {time.monotonic() - began:.1f} s")
    said = {
        tier: serve.status().applications[tier].deployments[tier].message.strip().splitlines()[-1]
        for tier in (GATED, ABSENT)
    }
    deploy(before)
    assert (
        f"tier {GATED}: {REPOSITORY} is gated: accept its licence at {hub.address}" in said[GATED]
    )
    assert f"run `flux-ray weights pull {REPOSITORY}@{COMMIT}`" in said[GATED]
    assert f"tier {ABSENT}: this machine has no folder /no/such/folder" in said[ABSENT]
    # No rank was started: each try cost one look at the hub.
    assert 1 <= sum(request.startswith("HEAD /owner") for request in hub.requests) <= 3
