"""Write the plain manifests again, from the chart: `python cluster/kuberay/render.py`.

They are what the chart makes of its default values, for whoever has no Helm; a test holds them
equal. It needs the extra `test`.
"""

from pathlib import Path
from typing import Any

import helm_python

FOLDER = Path(__file__).parent
MANIFESTS = FOLDER / "manifests"
NAME = "flux-ray"
# Of an address that stands for the reader's own. The chart refuses it; these manifests have it, and
# gateways refuse it.
STANDS_FOR = ".invalid"
HEAD = "# Made from the chart by cluster/kuberay/render.py: change that one.\n"
# Helm's word about itself, which is not true of these.
HELMS = ("helm.sh/", "app.kubernetes.io/managed-by:", "# Downloading them again takes hours")
ON = {"enabled": True}
MONITORING = {"podMonitor": ON, "alerts": ON, "dashboards": ON}
MONITORED = ("podmonitor", "prometheusrule", "dashboards")


def rendered(values: dict[str, Any]) -> dict[str, str]:
    """Return the manifests by the name of their template, without those that are empty."""
    helm_python.disable_logging()
    fleet = (FOLDER / "chart" / "files" / "fleet.yaml").read_text()
    values = values | {"serve": {"config": fleet.replace(STANDS_FOR, ".put-back")}}
    files = helm_python.Chart.load(FOLDER / "chart").render(values, name=NAME)
    return {
        Path(path).stem: without_helm(text.replace(".put-back", STANDS_FOR))
        for path, text in files.items()
        if path.endswith(".yaml") and text.strip()
    }


def without_helm(text: str) -> str:
    """Return a manifest without Helm's labels, and without annotations if those were all."""
    lines = [line for line in text.strip().splitlines() if not line.strip().startswith(HELMS)]
    kept = [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if line.strip() != "annotations:" or indent(after) > indent(line)
    ]
    return "\n".join(kept).removeprefix("---\n") + "\n"


def indent(line: str) -> int:
    """Return how many spaces a line begins with."""
    return len(line) - len(line.lstrip())


def manifests() -> dict[Path, str]:
    """Return the text of each manifest by its path."""
    base = {MANIFESTS / "base" / f"{name}.yaml": text for name, text in rendered({}).items()}
    monitored = rendered({"monitoring": MONITORING})
    more = {
        MANIFESTS / "components" / "monitoring" / f"{name}.yaml": monitored[name]
        for name in MONITORED
    }
    return {path: HEAD + text for path, text in (base | more).items()}


def main() -> None:
    """Write them all."""
    for path, text in manifests().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
