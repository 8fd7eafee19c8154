"""What the files of cluster/ and serve/ say, read by the grammar of each."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from flux_ray.config import BUILDERS
from flux_ray.config.tier import Args

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKER = CLUSTER / "docker"
MACHINES = CLUSTER / "vm"
CHART = CLUSTER / "kuberay" / "chart"
HAPROXY = CLUSTER / "load_balancer" / "haproxy.cfg"
NGINX = CLUSTER / "load_balancer" / "nginx.conf"
SERVE_CONFIGS = sorted([*(ROOT / "serve").glob("*.yaml"), *DOCKER.glob("serve*.yaml")])

UNITS_OF_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
UNITS_OF_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def seconds(text: str) -> float:
    """Return the seconds of `30s`, `500ms` or `60`."""
    number, unit = re.fullmatch(r"([\d.]+)(ms|s|m|h|)", str(text)).groups()
    return float(number) * UNITS_OF_TIME[unit]


def num_bytes(text: str) -> float:
    """Return the bytes of `64m`, `3gb`, `768Gi` or `2000000000`, as nginx, Docker or Kubernetes."""
    number, unit = re.fullmatch(r"([\d.]+)([kmg]?i?)b?", str(text).lower()).groups()
    return float(number) * UNITS_OF_BYTES[unit]


def args_in(text: str) -> dict[str, Args]:
    """Return the typed args of each application of ours in a Serve config file, by its name."""
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    return {
        application.name: BUILDERS[application.import_path].model_validate(application.args)
        for application in schema.applications
        if application.import_path in BUILDERS
    }


def environment_in(path: Path) -> dict[str, str]:
    """Return the variables of a file that both sh and systemd read."""
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def environment_of_make() -> dict[str, str]:
    """Return what `make serve` exports, as the Makefile writes it."""
    text = (ROOT / "Makefile").read_text()
    exported = re.findall(r"^serve: export (\w+) \?=[ ]?(.*)$", text, re.M)
    return {**dict(exported), **dict(re.findall(r"^(RAY_AUTH_MODE) \?= (\w+)$", text, re.M))}


def environment_of_image() -> dict[str, str]:
    """Return the variables that the image of cluster/docker/ gives every process."""
    text = re.sub(r"^ *#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
    words = [
        word
        for block in re.findall(r"^ENV ((?:.*\\\n)*.*)$", text, re.M)
        for word in shlex.split(block.replace("\\\n", " "))
    ]
    return dict(word.split("=", 1) for word in words)


def unit(name: str) -> dict[str, list[str]]:
    """Return the keys of a systemd unit, in all of its sections, each with its values in order."""
    keys: dict[str, list[str]] = {}
    for line in (MACHINES / f"flux-ray-{name}.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            keys.setdefault(key, []).append(value)
    return keys


def environment_of_unit(name: str) -> dict[str, str]:
    """Return what a unit sets itself, without its files."""
    return dict(value.split("=", 1) for value in unit(name).get("Environment", []))


def haproxy_lines() -> list[list[str]]:
    """Return the words of each line of haproxy.cfg."""
    lines = (shlex.split(line, comments=True) for line in HAPROXY.read_text().splitlines())
    return [words for words in lines if words]


def haproxy_timeout(name: str) -> float:
    (value,) = (words[2] for words in haproxy_lines() if words[:2] == ["timeout", name])
    return seconds(value)


def haproxy_word(name: str) -> str:
    """Return the word behind the only line that begins with `name`."""
    (value,) = (words[1] for words in haproxy_lines() if words[0] == name)
    return value


def haproxy_option(line: str, name: str) -> str:
    """Return the word behind `name` on the line that begins with the word `line`."""
    (found,) = (words for words in haproxy_lines() if words[0] == line and name in words)
    return found[found.index(name) + 1]


def nginx_value(name: str, block: str | None = None) -> str:
    """Return the value of a directive, of the block of that name if it is in several."""
    text = re.sub(r"#.*", "", NGINX.read_text())
    if block is not None:
        text = re.search(rf"\b{block}[^{{;]*{{([^}}]*)}}", text)[1]
    (value,) = re.findall(rf"(?:^|[;{{}}])\s*{name} ([^;]+);", text, re.M)
    return str(value)


@cache
def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """Return what a compose file says, each variable with its default."""
    return with_defaults(yaml.safe_load((DOCKER / name).read_text()))


def with_defaults(value: Any) -> Any:
    """Put their defaults in the place of variables, `${NAME:-default}`, and "" where none is."""
    if isinstance(value, dict):
        return {key: with_defaults(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_defaults(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"\$\{\w+(?::?-([^}]*)|:\?[^}]*)\}", lambda found: found[1] or "", value)
    return value


@cache
def rendered_chart() -> tuple[dict[str, Any], ...]:
    """Return all objects of the Helm chart with its own values; none while there is no chart.

    Only its addresses are somebody's: the chart refuses its own, which stand for them.
    """
    if not CHART.exists():
        return ()
    import helm_python

    helm_python.disable_logging()
    fleet = (CHART / "files" / "fleet.yaml").read_text().replace(".invalid", ".example.com")
    files = helm_python.Chart.load(str(CHART)).render({"serve": {"config": fleet}})
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return tuple(each for text in texts for each in yaml.safe_load_all(text) if each)


def ray_service() -> dict[str, Any] | None:
    """Return the spec of the chart's RayService."""
    found = [each for each in rendered_chart() if each["kind"] == "RayService"]
    return found[0]["spec"] if found else None


def pods_of_chart() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the groups of Pods that run Ray: `head` or `worker`, the group, and its Pod's spec."""
    service = ray_service()
    if service is not None:
        ray = service["rayClusterConfig"]
        for kind, group in [
            ("head", ray["headGroupSpec"]),
            *(("worker", each) for each in ray["workerGroupSpecs"]),
        ]:
            yield kind, group, group["template"]["spec"]
