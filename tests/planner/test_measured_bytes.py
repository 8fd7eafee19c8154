"""The plan against what was measured on cards: never below it, and not far above."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_ray.catalog.gpus import card_for
from flux_ray.config.tier import Parallel
from flux_ray.planner.candidate import Candidate, default_demand
from tests.bench.gpu_jobs import PRECISIONS, beside_plan
from tests.bench.gpu_models import REAL

RESULTS = Path(__file__).parents[1] / "bench" / "results"
ROW = re.compile(r"\| (?P<model>[\w-]+) (?P<case>[\w.]+) +\| (?P<part>\w+) +\| (?P<gb>[\d.]+) +\| ")
GB = 10**9
# Of a table's digits, and of PyTorch's allocator, which rounds each tensor up to 512 bytes.
ROUNDED = 0.001
# The most is dev's step in FP8 on one of eight ranks, where little is left of it.
AT_MOST = 1.16


def measured_rows() -> Iterator[tuple[str, str, str, str, float]]:
    """File, model, case, part and gigabytes of every row that a plan says something of."""
    for path in sorted(RESULTS.glob("gpu-*.md")):
        text = path.read_text()
        assert "real sizes" in text
        section = text.partition("## Bytes, GB")[2].partition("\n## ")[0]
        for line in section.splitlines():
            row = ROW.match(line)
            if row and row["model"] != "CUDA":
                yield path.name, row["model"], row["case"], row["part"], float(row["gb"])


def planned_candidate(model: str, case: str) -> Candidate:
    """As the bench laid it out: `tp4.fp8` of dev, `bf16` of klein-4b."""
    device = SimpleNamespace(card=card_for("h100-80gb"))
    degree, _, precision = case.rpartition(".")
    quantization = PRECISIONS[precision]
    if model == "klein-4b":
        return REAL.klein.candidate(
            device, quantization=quantization, encoder_quantization=quantization
        )
    parallel = Parallel(tensor=int(degree.removeprefix("tp")))
    return REAL.dev.candidate(
        device, parallel=parallel, quantization=quantization, text_encoder="shared"
    )


ROWS = list(measured_rows())


def test_the_tables_have_rows() -> None:
    assert len(ROWS) >= 28
    assert {part for _, _, _, part, _ in ROWS} >= {"decode", "step", "encode", "weights", "whole"}


@pytest.mark.parametrize(
    ("model", "case", "part", "gigabytes"),
    [row[1:] for row in ROWS],
    ids=[" ".join(row[:4]) for row in ROWS],
)
def test_planned_bytes_are_no_less_than_measured_ones(
    model: str, case: str, part: str, gigabytes: float
) -> None:
    candidate = planned_candidate(model, case)
    needed = {"image": 0, "weights": 0} if part in ("image", "whole") else {part: 0}
    planned = beside_plan(candidate, needed)[part]["planned"] / GB
    assert gigabytes - ROUNDED <= planned <= AT_MOST * gigabytes


def test_a_processor_decodes_without_what_a_card_copies() -> None:
    on_card = planned_candidate("klein-4b", "bf16")
    alone = Candidate(on_card.model, on_card.tier, on_card.args, None)
    demand = default_demand(on_card.tier)
    assert on_card.vae_peak(demand) == int(1.6 * alone.vae_peak(demand))
