"""Print the figures as tables that can be read both on a terminal and as Markdown."""

from collections.abc import Iterator
from typing import Any

GB = 10**9
Figures = dict[str, Any]
Row = tuple[str, ...]

PUBLISHED = {
    "klein-4b bf16 image": "under 1 on a GB200; 0.57 on an H100",
    "klein-4b fp8 image": "under 1 on a GB200; 0.57 on an H100",
    "dev tp1.bf16 step": "0.4605 on an H100 (SGLang)",
}
NOTES = """\
Random weights. An image has the tier's default size: four steps of klein-4b, a step of dev. dev's
ranks are rank 0 of 1, 2, 4 or 8 without the others: what a rank computes, and every all-reduce is
skipped. Bytes of a stage are beyond the weights; planned ones are those of `flux-ray plan` for one
request at a time. FP8 weights that become `_scaled_mm` products are multiplied with FP8
activations; the others are unpacked first. The error is that of one velocity to the same weights in
bf16. Cold files were taken out of memory before they were read; warm ones were not."""


def report(figures: Figures) -> str:
    """Return all tables."""
    device = figures["device"]
    parts = [
        f"# {device['name']}, {figures['scale']} sizes, torch {device['torch']}",
        NOTES,
        table("Seconds", ("model", "stage", "median", "best", "published"), seconds_rows(figures)),
        table("Bytes, GB", ("model", "part", "measured", "planned", "ratio"), bytes_rows(figures)),
        table(
            "FP8",
            ("model", "part", "products", "_scaled_mm", "weights", "error to bf16"),
            fp8_rows(figures),
        ),
        table(
            "Loading",
            ("files", "GB read", "cold s", "GB/s", "warm s", "GB/s", "peak GB", "note"),
            load_rows(figures),
        ),
        table("Remarks", ("what", "remark"), remark_rows(figures)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(title: str, header: Row, rows: Iterator[Row]) -> str:
    """Return a table with aligned columns, or an empty string if it has no rows."""
    lines = [header, *rows]
    if len(lines) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    written = (
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join([f"## {title}", "", *(f"| {line} |" for line in written)])


def measured_cases(figures: Figures) -> Iterator[tuple[str, Figures]]:
    """Yield the cases of loaded models that have figures."""
    for job in ("klein-4b", "dev"):
        for name, case in figures.get(job, {}).items():
            if "seconds" in case:
                yield f"{job} {name}", case


def seconds_rows(figures: Figures) -> Iterator[Row]:
    """Yield a row for each stage."""
    published = PUBLISHED if figures["scale"] == "real" else {}
    for name, case in measured_cases(figures):
        for stage, seconds in case["seconds"].items():
            times = number(seconds["median_s"]), number(seconds["best_s"])
            yield name, stage, *times, published.get(f"{name} {stage}", "")


def bytes_rows(figures: Figures) -> Iterator[Row]:
    """Yield a row for each component and stage, and one for the GPU."""
    runtime = figures["device"]["runtime"]
    yield "CUDA and others", "runtime", *beside(runtime["measured"], runtime["planned"])
    for name, case in measured_cases(figures):
        for part, both in case["bytes"].items():
            yield name, part, *beside(both["measured"], both["planned"])
        yield name, "at most while loading", gigabytes(case["load_peak_bytes"]), "", ""


def beside(measured: int | None, planned: int | None) -> tuple[str, str, str]:
    """Return both numbers, and the measured one as a part of the planned one."""
    ratio = "-" if not planned or measured is None else f"{measured / planned:.2f}"
    return gigabytes(measured), gigabytes(planned), ratio


def fp8_rows(figures: Figures) -> Iterator[Row]:
    """Yield a row for each module in FP8."""
    for name, case in measured_cases(figures):
        for part, products in case["fp8"].items():
            counts = (str(products[key]) for key in ("num_scaled_mm", "num_fp8_weights"))
            error = number(case["error_to_bf16"]) if part == "step" else ""
            yield name, part, products["kind"], *counts, error


def load_rows(figures: Figures) -> Iterator[Row]:
    """Yield a row for each set of files."""
    for name, case in figures.get("load", {}).items():
        if "cold_s" not in case:
            continue
        read = case["read_bytes"]
        times = (
            cell
            for seconds in (case["cold_s"], case["warm_s"])
            for cell in (number(seconds), number(read / seconds / GB))
        )
        yield name, gigabytes(read), *times, gigabytes(case["peak_bytes"]), case["note"]


def remark_rows(figures: Figures) -> Iterator[Row]:
    """Yield a row for each case that was skipped or failed, or whose output is not finite."""
    for job in ("klein-4b", "dev", "load"):
        for name, case in figures.get(job, {}).items():
            for word in ("skipped", "failed"):
                if word in case:
                    yield f"{job} {name}", f"{word}: {case[word]}"
            if not case.get("is_finite", True):
                yield f"{job} {name}", "its answer is not finite"


def gigabytes(num_bytes: int | None) -> str:
    """Return gigabytes with enough digits for the small models too."""
    return "-" if num_bytes is None else f"{num_bytes / GB:.3f}"


def number(value: float | None) -> str:
    """Return a number with three significant digits."""
    return "-" if value is None else f"{value:.3g}"
