"""Make grafana/flux-ray.json of panels.py: `python -m cluster.monitoring.dashboard`.

It needs the extra `test`. One screen answers: are we keeping the promise, where does the time go,
what will scale next, who uses it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from cluster.monitoring.panels import ROWS, Panel

FILE = Path(__file__).parent / "grafana" / "flux-ray.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Of the 24 columns of Grafana's grid: six panels side by side, and four rows of them on a screen.
WIDTH, HEIGHT = 4, 5
FIRST_ROW_ID = 101


def targets_of(panel: Panel) -> Iterator[prometheus.Dataquery]:
    """Yield a builder for each query of a panel."""
    for number, (query, legend) in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query).legend_format(legend).datasource(SOURCE)
        target = target.ref_id(chr(ord("A") + number))
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE)
        yield target.instant() if panel.kind in ("table", "number") else target.range()


def graph_of(panel: Panel) -> Any:
    """Return the builder of a panel's own kind, without what all kinds have."""
    if panel.kind == "number":
        last = common.ReduceDataOptions().calcs(["lastNotNull"])
        return stat.Panel().decimals(2).reduce_options(last)
    if panel.kind == "table":
        return table.Panel().show_header(True)
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    graph = timeseries.Panel().legend(legend).min(0).show_points(VisibilityMode.NEVER)
    graph = graph.draw_style(GraphDrawStyle.LINE).line_width(1)
    if panel.kind == "stack":
        graph = graph.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    return graph


def built(panel: Panel) -> Any:
    """Return the builder of a panel; rows are as high as half a dozen of them fit a screen."""
    graph = graph_of(panel).title(panel.title).id(panel.panel_id).description(panel.description)
    graph = graph.unit(panel.unit).datasource(SOURCE).span(WIDTH).height(HEIGHT)
    for target in targets_of(panel):
        graph = graph.with_target(target)
    return graph


def dashboard() -> grafana.Dashboard:
    """Return the builder of the whole dashboard."""
    made = (
        grafana.Dashboard("flux-ray")
        .uid("flux-ray")
        .description("Made of cluster/monitoring/panels.py. What it shows: docs/monitoring.md.")
        .tags(["flux-ray", "ray"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .with_variable(
            grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(
            grafana.QueryVariable("tier")
            .label("Tier")
            .datasource(SOURCE)
            .query("label_values(ray_flux_replica_gpus, tier)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(text="All", value="$__all", selected=True))
        )
    )
    for number, (title, panels) in enumerate(ROWS):
        made = made.with_row(grafana.Row(title).id(FIRST_ROW_ID + number))
        for panel in panels:
            made = made.with_panel(built(panel))
    return made


def text() -> str:
    """Return the dashboard as the JSON file has it."""
    found = json.loads(JSONEncoder(sort_keys=True).encode(dashboard().build()))
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
