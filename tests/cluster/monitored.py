"""A real Prometheus beside the shared Ray, and callers who make it count everything once."""

import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from flux_ray.auth.keys import change_keys, new_key, with_key
from flux_ray.gateway.callers import DEADLINE
from tests.cluster.conftest import PATIENCE_S, ROOT, free_port

MONITORING = ROOT / "cluster" / "monitoring"
CLASSES = {"gold": {"weight": 4.0}, "free": {"requests_per_minute": 1}}
PREFIX = "/monitored"
# So often that a test sees what a fleet sees in minutes. It is the time limit of a scrape, too, and
# a Ray that has run many tests on a busy machine takes more than two seconds to answer.
SCRAPE_S = 5


class Prometheus:
    """A running Prometheus, asked over HTTP."""

    def __init__(self, client: httpx.Client) -> None:
        self.url = str(client.base_url)
        self._client = client

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return the series of an instant query; raise if the query is wrong."""
        answer = self._client.post("/api/v1/query", data={"query": query})
        assert answer.status_code == 200, f"{query}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def scrape_errors(self) -> list[str]:
        """Return why targets were last scraped in vain."""
        targets = self._client.get("/api/v1/targets").json()["data"]["activeTargets"]
        return [each["lastError"] for each in targets if each["lastError"]]


@contextmanager
def prometheus_beside_ray(folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with our prometheus.yml and alerts, against the Ray of this process."""
    import ray

    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    discovery = folder / "discovery.json"
    discovery.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    [scraped] = config["scrape_configs"]
    scraped["file_sd_configs"] = [{"files": [str(discovery)]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    running = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_S) as client:
            yield Prometheus(client)
    finally:
        running.terminate()
        running.wait(PATIENCE_S)


def monitored(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a config with one more gateway, which asks for keys, and a tier that is scaled.

    With it comes a secret of each class. Webhooks of that gateway are given up at once, and one of
    its tiers is not deployed.
    """
    config = json.loads(json.dumps(config))
    gateway, tiny, _ = config["applications"]
    tiny["args"]["autoscaling"] = {"min_replicas": 1, "max_replicas": 1}
    secrets = {}
    for name in CLASSES:
        made = new_key(name, name, datetime.now(UTC))
        change_keys(folder / "keys.yaml", lambda file, made=made: with_key(file, made.key))
        secrets[name] = made.secret
    keyed = gateway | {"name": "gateway-with-keys", "route_prefix": PREFIX}
    keyed["args"] = gateway["args"] | {
        "tiers": ["tiny", "tiny-tp2", "flux-2-dev"],
        "default_tier": "tiny",
        "aliases": {},
        "keys_file": str(folder / "keys.yaml"),
        "key_classes": CLASSES,
        "jobs": {
            "database": f"sqlite:///{folder}/jobs.sqlite3",
            "results": f"{folder}/results",
            "webhook_retries_s": [],
        },
        "webhooks": {"networks": ["127.0.0.0/8"], "ports": [closed_port()]},
    }
    config["applications"].append(keyed)
    return config, secrets


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Callers:
    """Callers who bring each metric to count: what they ask for, and what they get."""

    def __init__(self, config: dict[str, Any], address: str, secrets: dict[str, str]) -> None:
        self.url = f"{address}{PREFIX}"
        self.secrets = secrets
        [port] = config["applications"][-1]["args"]["webhooks"]["ports"]
        self.webhook = f"https://127.0.0.1:{port}/"

    def generate(self, key: str = "gold", deadline_s: float = 500.0, **fields: object) -> int:
        """Ask for an image; return the status."""
        body = {"model": "tiny", "prompt": "a red circle", "size": "128x128", **fields}
        headers = {"x-key": self.secrets[key], DEADLINE: str(deadline_s)}
        url = f"{self.url}/v1/images/generations"
        return httpx.post(url, json=body, headers=headers, timeout=PATIENCE_S).status_code

    def many(self, number: int, **fields: object) -> set[int]:
        """Ask for so many images at once; return the statuses."""
        with ThreadPoolExecutor(number) as threads:
            return set(threads.map(lambda seed: self.generate(seed=seed, **fields), range(number)))

    def hand_in_a_job(self) -> int:
        """Hand in a job whose webhook nobody takes; return the status."""
        body = {"prompt": "a red circle", "webhook_url": self.webhook}
        headers = {"x-key": self.secrets["gold"]}
        return httpx.post(f"{self.url}/v1/tiny", json=body, headers=headers).status_code

    def come_once(self) -> None:
        """Ask for images, hand in a job, and meet refusals, a missing tier and a limit."""
        assert self.generate() == self.generate(model="tiny-tp2") == 200
        assert self.many(12, deadline_s=1.0) >= {429}, "so many cannot be done in a second"
        assert self.generate(model="flux-2-dev") == 503
        assert self.hand_in_a_job() == 200
        self.generate("free")
        assert self.generate("free") == 429

    def lose_a_replica(self, folder: Path) -> int:
        """Ask for an image that breaks its first replica (faulty_rank.py); return the status."""
        order = folder / "order"
        order.write_text("bug")
        return self.generate(model="tiny-tp2", prompt=str(order))
