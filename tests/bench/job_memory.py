"""Measure the memory of a gateway that gets 64 jobs at once, each with six 20-megapixel references.

The gateway is a process of its own with its real HTTP, decoding, budget, job store and worker. In
place of the cluster are two slots that answer after a moment. The tier is flux-2-dev, which takes
six references. It also measures how many bytes are sent to a replica for an edit with one such
reference, before and after references were scaled in the gateway.
"""

import asyncio
import json
import pickle
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import Limits
from flux_ray.gateway.images.decode import decode, decode_reference, whole_image
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.gateway.openai.request import request_for
from tests.jobs.memory_gauge import Load, large_jpeg, measure

LOAD = Load(num_jobs=64, num_references=6)
BUDGET = Limits(max_held_bytes=2**30)
ALLOWED_BYTES = 400_000_000
MB = 1e6


def travel_bytes(tier_name: str) -> tuple[int, int]:
    """Return the bytes of an edit with its reference in full size, and as it is sent now."""
    tier, limits = tier_for(tier_name), Limits()
    data = large_jpeg(LOAD.width, LOAD.height, seed=0)
    max_pixels = [tier.max_reference_pixels]
    fields = ImageFields(prompt="make it green", seed=7)
    whole = whole_image(decode(data, limits, "image 1"), max_pixels)
    scaled = decode_reference(data, limits, "image 1", max_pixels)
    before, after = (
        request_for(fields, tier, limits, RequestImages((each,))) for each in (whole, scaled)
    )
    return len(pickle.dumps(before, protocol=5)), len(pickle.dumps(after, protocol=5))


def main() -> None:
    figures: dict[str, object] = {}
    print(f"{'an edit with a 20 MP reference':36} {'before':>10} {'after':>10}")
    for name in ("tiny", "flux-2-klein-4b", "flux-2-dev"):
        before, after = travel_bytes(name)
        print(f"{name + ', MB that travel':36} {before / MB:10.2f} {after / MB:10.2f}")
        figures[f"travel_bytes.{name}"] = {"before": before, "after": after}
    with tempfile.TemporaryDirectory() as folder:
        seen = asyncio.run(measure(LOAD, Path(folder), BUDGET))
    allowed = BUDGET.max_held_bytes + ALLOWED_BYTES
    rows = {
        "jobs ready": f"{seen.num_ready} of {LOAD.num_jobs}",
        "refused and asked again": str(seen.num_refused + seen.num_cut_off),
        "seconds in all": f"{seen.seconds:.0f}",
        "idle, resident MB": f"{seen.idle_bytes / MB:.0f}",
        "peak, resident MB": f"{seen.peak_bytes / MB:.0f}",
        "budget, MB": f"{BUDGET.max_held_bytes / MB:.0f}",
        "budget plus 400 MB": f"{allowed / MB:.0f}",
    }
    for name, value in rows.items():
        print(f"{name:36} {value:>10}")
    figures |= vars(seen) | {"max_held_bytes": BUDGET.max_held_bytes, "allowed_bytes": allowed}
    print(json.dumps(figures))
    assert seen.num_ready == LOAD.num_jobs and seen.peak_bytes <= allowed


if __name__ == "__main__":
    main()
