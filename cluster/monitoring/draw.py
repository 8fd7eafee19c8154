"""Draw all panels of the dashboard without Grafana.

`python -m cluster.monitoring.draw http://127.0.0.1:9090 panels.png` asks that Prometheus. A panel
without data says so in red.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as dates
import matplotlib.pyplot as plt
from matplotlib.ticker import LinearLocator
from PIL import Image

from cluster.monitoring.panels import ROWS, Panel, all_panels

COLUMNS = 6
NUM_POINTS = 120
FACTORS = {"percentunit": (100, "%"), "s": (1, "s"), "decmbytes": (1, "MB"), "reqps": (1, "/s")}


class Line(NamedTuple):
    """One series of a graph: its legend, and its values by time in seconds since 1970."""

    legend: str
    times_s: list[float]
    values: list[float]


def filled(query: str, rate_window: str = "1m", time_shown: str = "1h", tier: str = ".*") -> str:
    """Return the query with Grafana's variables filled in."""
    query = query.replace("$__rate_interval", rate_window).replace("$__range", time_shown)
    return query.replace("$tier", tier)


def legend_of(pattern: str, labels: dict[str, str]) -> str:
    """Return a legend for a series, as Grafana makes it; without a pattern all of its labels."""
    if not pattern:
        return " ".join(labels.values())
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), pattern).strip()


def lines_of(client: httpx.Client, panel: Panel, minutes: float) -> Iterator[Line]:
    """Ask Prometheus for the last minutes of each query of a panel."""
    now = time.time()
    window = {"start": now - 60 * minutes, "end": now, "step": 60 * minutes / NUM_POINTS}
    for query, pattern in panel.queries:
        asked = {"query": filled(query, time_shown=f"{60 * minutes:.0f}s"), **window}
        answer = client.post("/api/v1/query_range", data=asked)
        answer.raise_for_status()
        for found in answer.json()["data"]["result"]:
            points = [(at, float(value)) for at, value in found["values"] if value != "NaN"]
            if points:
                times_s, values = zip(*points, strict=True)
                legend = legend_of(pattern, found["metric"])
                yield Line(legend, list(times_s), list(values))


def draw_panel(axes: Any, panel: Panel, lines: list[Line]) -> None:
    """Draw a panel as Grafana would, as far as it matters."""
    factor, unit = FACTORS.get(panel.unit, (1, ""))
    axes.set_title(f"{panel.title} [{unit}]" if unit else panel.title, fontsize=7, loc="left")
    axes.tick_params(labelsize=5)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(LinearLocator(3))
    if not lines:
        axes.text(0.5, 0.5, "NO DATA", color="red", ha="center", transform=axes.transAxes)
        return
    if panel.kind == "number":
        last = f"{lines[0].values[-1] * factor:.2f} {unit}"
        axes.text(0.5, 0.5, last, fontsize=16, ha="center", transform=axes.transAxes)
        return
    below: dict[float, float] = {}
    for line in lines:
        times = [datetime.fromtimestamp(at, UTC) for at in line.times_s]
        values = [factor * value for value in line.values]
        if panel.kind == "stack":
            floor = [below.get(at, 0.0) for at in line.times_s]
            values = [value + under for value, under in zip(values, floor, strict=True)]
            axes.fill_between(times, floor, values, alpha=0.3)
            below |= dict(zip(line.times_s, values, strict=True))
        axes.plot(times, values, linewidth=0.8, label=line.legend[:34])
    axes.set_ylim(0, 1.25 * (axes.dataLim.y1 or 1))
    axes.legend(fontsize=4, frameon=False, loc="upper left", ncols=2)


def draw(url: str, path: str, minutes: float) -> list[str]:
    """Draw all panels into a PNG; return the titles of those without data."""
    num_rows = sum(-(-len(panels) // COLUMNS) for _, panels in ROWS)
    figure, grid = plt.subplots(num_rows, COLUMNS, figsize=(16, 1.75 * num_rows), squeeze=False)
    empty = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for axes, panel in zip(grid.flat, all_panels(), strict=False):
            lines = list(lines_of(client, panel, minutes))
            draw_panel(axes, panel, lines)
            if not lines:
                empty.append(panel.title)
    for axes in grid.flat[len(list(all_panels())) :]:
        axes.axis("off")
    for number, (title, _) in enumerate(ROWS):
        place = {"xycoords": "axes fraction", "fontsize": 8, "weight": "bold"}
        grid[number][0].annotate(title, (0, 1.22), **place)
    figure.subplots_adjust(0.02, 0.02, 0.99, 0.96, wspace=0.18, hspace=0.6)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as image:
        # Few colours make a small file.
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
    return empty


def main() -> None:
    """Draw the panels of a running cluster, and print which of them have no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("path")
    parser.add_argument("--minutes", type=float, default=30.0)
    asked = parser.parse_args()
    for title in draw(asked.url, asked.path, asked.minutes):
        sys.stdout.write(f"no data: {title}\n")


if __name__ == "__main__":
    main()
