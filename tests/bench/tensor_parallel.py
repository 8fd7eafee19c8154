"""Compare ways to split a model over two ranks: ours, DTensor (diffusers' way), DeepSpeed AutoTP.

Ranks are processes of one thread each that communicate over gloo on the loopback. Other programs on
the machine disturb wall times, so the ways take turns and medians count. Time outside of
communication is the CPU time of a rank's own thread, which sleeps while gloo's threads communicate.
"1 rank" is measured with both cores as busy as with two ranks: each process runs a whole model.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

from flux_ray.config.tier import Parallel
from tests.bench.split_jobs import measure_forwards, measure_host, measure_loads
from tests.bench.split_models import (
    DEV_DEPTH,
    DEV_INPUTS,
    MID,
    MID_INPUTS,
    least_bytes,
    num_row_parallel,
    save_models,
)
from tests.parallel.peers import T5_WAYS, TEXT_WAYS, WAYS
from tests.ranks import Ranks

NUM_ROUNDS = 9
PATIENCE_S = 600
COMPUTE_LIMIT = 0.56
TWO = Parallel(tensor=2)
Figures = dict[str, dict[str, Any]]
Answers = list[dict[str, Any]]

# The keys of the JSON object in the last line, in its order, with their labels in the table.
ROWS = {
    "max_error": "largest error, of the output's scale",
    "host_us_per_linear": "host us a split linear, at dev's depth",
    "forward_s_tp1": "seconds a forward, 1 rank",
    "forward_s_tp2": "seconds a forward, 2 ranks",
    "compute_s_tp2": "seconds outside communication, 2 ranks",
    "num_collectives": "collectives a forward, at dev's depth",
    "collective_bytes": "their bytes",
    "peak_bytes_per_rank": "peak anonymous bytes of a rank at load",
    "read_bytes_per_rank": "bytes that a rank takes from the files",
}
DETAILS = {
    "ratio_to_ours": "forward at 2 ranks to ours in the same round",
    "compute_s_tp1": "seconds outside communication, 1 rank",
    "compute_ratio": f"that of 2 ranks to 1: at most {COMPUTE_LIMIT}",
    "compute_ratio_of_best": "the same of the best rounds",
    "num_collectives_300m": "collectives a forward, 300 M model",
    "collective_bytes_300m": "their bytes",
    "peak_resident_bytes": "peak resident bytes at load, with mapped files",
    "load_s": "seconds to load",
    "import_s": "seconds to import",
}
TEXT_ROWS = {
    "max_error": "largest error, of the hidden states' scale",
    "forward_s_tp2": "seconds for 512 tokens, 2 ranks",
    "ratio_to_ours": "that to ours in the same round",
    "compute_s_tp2": "of these outside communication",
    "num_collectives": "collectives a forward",
    "collective_bytes": "their bytes",
    "peak_anonymous_bytes": "peak anonymous bytes of a rank at load",
    "peak_resident_bytes": "peak resident bytes at load, with mapped files",
    "held_bytes": "bytes of weights that a rank holds",
    "read_bytes": "bytes that a rank takes from the files",
    "load_s": "seconds to load",
}


def run_apart(parallel: Parallel, job: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a function on new rank processes, and return the ranks' results."""
    ranks = Ranks(PATIENCE_S)
    try:
        return ranks(parallel, job, *args)
    finally:
        ranks.close()


def worst(answers: Answers, model: str) -> dict[str, Any]:
    """Return the largest value of each figure over the ranks."""
    return {name: max(answer[model][name] for answer in answers) for name in answers[0][model]}


def walls_s(answers: Answers, name: str) -> list[float]:
    """Return the wall seconds of a forward by round, until its last rank is done."""
    rounds = zip(*(answer["seconds"][name] for answer in answers), strict=True)
    return [max(wall for wall, _ in ranks) for ranks in rounds]


def computes_s(answers: Answers, name: str) -> list[float]:
    """Return the CPU seconds by round, of the rank that computes longest."""
    rounds = zip(*(answer["seconds"][name] for answer in answers), strict=True)
    return [max(thread for _, thread in ranks) for ranks in rounds]


def ratio_to_ours(answers: Answers, model: str, way: str) -> float:
    """Return the median ratio to ours over rounds, in each of which the machine's load is alike."""
    ours, theirs = (walls_s(answers, f"{model}.{of}.tp2") for of in ("ours", way))
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def forward_figures(answers: Answers, name: str) -> dict[str, Any]:
    """Return the figures of a model on two ranks."""
    return answers[0]["first"][name] | {
        "max_error": max(answer["first"][name]["max_error"] for answer in answers),
        "forward_s_tp2": median(walls_s(answers, name)),
        "compute_s_tp2": median(computes_s(answers, name)),
    }


def way_figures(way: str, host: dict[str, Any], loads: Answers, answers: Answers) -> dict[str, Any]:
    """Return all figures of a way to split the transformer."""
    one, two = f"mid.{way}.tp1", f"mid.{way}.tp2"
    mid, load = forward_figures(answers, two), worst(loads, "mid")
    return {
        **{key: mid[key] for key in ("max_error", "forward_s_tp2", "compute_s_tp2")},
        **{key: host[key] for key in ("host_us_per_linear", "num_collectives", "kinds")},
        "collective_bytes": host["collective_bytes"],
        "forward_s_tp1": median(walls_s(answers, one)),
        "peak_bytes_per_rank": load["peak_anonymous_bytes"],
        "read_bytes_per_rank": load["read_bytes"],
        "compute_s_tp1": (whole_s := median(computes_s(answers, one))),
        "compute_ratio": mid["compute_s_tp2"] / whole_s,
        "compute_ratio_of_best": min(computes_s(answers, two)) / min(computes_s(answers, one)),
        "num_collectives_300m": mid["num_collectives"],
        "collective_bytes_300m": mid["collective_bytes"],
        "ratio_to_ours": ratio_to_ours(answers, "mid", way),
        "peak_resident_bytes": load["peak_resident_bytes"],
        "load_s": load["load_s"],
        **worst(loads, "import"),
    }


def text_figures(model: str, loads: Answers, answers: Answers, way: str) -> dict[str, Any]:
    """Return all figures of a way to split a text encoder."""
    return (
        worst(loads, model)
        | forward_figures(answers, f"{model}.{way}.tp2")
        | {"ratio_to_ours": ratio_to_ours(answers, model, way)}
    )


def measure(root: Path) -> tuple[Figures, Figures, Figures]:
    """Measure all ways; return the figures of the transformer, those of Qwen3, and of T5."""
    expected = save_models(root)
    host = run_apart(Parallel(), measure_host, root / "dev_depth")[0]
    loads = {way: run_apart(TWO, measure_loads, way, root) for way in WAYS}
    answers = run_apart(TWO, measure_forwards, root, expected, NUM_ROUNDS)
    return (
        {way: way_figures(way, host[way], loads[way], answers) for way in WAYS},
        {way: text_figures("text", loads[way], answers, way) for way in TEXT_WAYS},
        {way: text_figures("t5", loads[way], answers, way) for way in T5_WAYS},
    )


def show(title: str, figures: Figures, rows: dict[str, str]) -> None:
    """Print a table with a row for each figure and a column for each way."""
    print(f"\n{title:50}" + "".join(f"{way:>16}" for way in figures))
    for key, label in rows.items():
        cells = [column[key] for column in figures.values()]
        written = (f"{cell:16.4g}" if isinstance(cell, float) else f"{cell:16,}" for cell in cells)
        print(f"  {label:48}" + "".join(written))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ways, text, t5 = measure(Path(folder))
    show("transformer of 300 M parameters, 256 tokens", ways, ROWS | DETAILS)
    least = {
        "dev_depth": (num_row_parallel(DEV_DEPTH), least_bytes(DEV_DEPTH, DEV_INPUTS)),
        "300m": (num_row_parallel(MID), least_bytes(MID, MID_INPUTS)),
    }
    for model, (num_collectives, num_bytes) in least.items():
        print(f"  the least for {model}: {num_collectives} collectives of {num_bytes:,} bytes")
    show("Qwen3, 9 of 12 layers of 197 M parameters", text, TEXT_ROWS)
    show("T5, 91 M parameters", t5, TEXT_ROWS)
    line = {way: {key: ways[way][key] for key in ROWS} for way in ways}
    details = {way: {key: ways[way][key] for key in (*DETAILS, "kinds")} for way in ways}
    print(json.dumps(line | {"details": details, "least": least, "text_encoder": text, "t5": t5}))


if __name__ == "__main__":
    main()
