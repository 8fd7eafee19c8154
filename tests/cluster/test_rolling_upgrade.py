"""A running cluster is upgraded, and taken back, one application at a time: nobody notices."""

import base64
import copy
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flux_ray.request import PROTOCOL
from flux_ray.wire import pack_call
from tests.cluster.conftest import ROOT, deploy, is_ready, wait_until
from tests.cluster.storm import PROMPT
from tests.newer_code import SHARP, VERSION, save_newer_code

GATEWAYS, PREFIX = "gateways-to-upgrade", "/to-upgrade"
NUM_SEEDS = 4
# The limit for upgrading one application, on a busy machine.
UPGRADE_S = 300
OLD, NEW = 0, 1


class Clients:
    """Two clients that ask for one image after the other, and one that submits and reads jobs."""

    def __init__(self, url: str, expected: list[bytes]) -> None:
        self._url = url
        self._expected = expected
        self._is_over = threading.Event()
        self._has_no_more_jobs = threading.Event()
        self.num_images = 0
        self.failures: list[str] = []
        self.jobs: list[tuple[int, str]] = []

    def request(self, method: str, url: str, **sent: Any) -> httpx.Response:
        """Send a request that must not fail: these clients do not retry."""
        answer = httpx.request(method, url, timeout=120, **sent)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer

    def keep_generating(self) -> None:
        for number in itertools.count():
            if self._is_over.is_set():
                return
            seed = number % NUM_SEEDS
            with self.noted():
                image = generate_by(self._url, PROMPT, seed)
                assert image == self._expected[seed], "another image"
                self.num_images += 1
            time.sleep(0.2)

    def keep_ordering(self) -> None:
        for number in itertools.count():
            if self._has_no_more_jobs.wait(0.8):
                return
            seed = number % NUM_SEEDS
            with self.noted():
                self.jobs.append((seed, self.order(PROMPT, seed)))

    def order(self, prompt: str, seed: int) -> str:
        """Submit a job, and return the URL at which to ask for it."""
        body = {"prompt": prompt, "seed": seed, "output_format": "png"}
        headers = {"x-key": "k"}
        told = self.request("POST", f"{self._url}/v1/tiny", json=body, headers=headers).json()
        return str(told["polling_url"])

    def state_of(self, polling_url: str) -> dict[str, Any]:
        told: dict[str, Any] = self.request("GET", polling_url, headers={"x-key": "k"}).json()
        return told

    def wait_for(self, polling_url: str) -> dict[str, Any]:
        """Wait until a job has ended, and return its last state."""
        wait_until(
            lambda: self.state_of(polling_url)["status"] != "Pending",
            timeout_s=UPGRADE_S,
            what=f"the end of {polling_url}",
        )
        return self.state_of(polling_url)

    def finish_jobs(self) -> None:
        """Submit no more jobs, and read the results of all that were submitted."""
        self._has_no_more_jobs.set()
        for seed, polling_url in self.jobs:
            told = self.wait_for(polling_url)
            assert told["status"] == "Ready", told
            image = self.request("GET", told["result"]["sample"]).content
            assert image == self._expected[seed]

    def go(self) -> None:
        self._is_over.set()
        self._has_no_more_jobs.set()

    def noted(self) -> "Noted":
        return Noted(self.failures)


class Noted:
    """A `with` that notes any error inside it, with the time since the start of the test."""

    def __init__(self, failures: list[str]) -> None:
        self._failures = failures

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, (AssertionError, httpx.HTTPError)):
            self._failures.append(f"{time.strftime('%X')} {error!r}")
            return True
        return False


def ask(url: str, prompt: str, seed: int) -> httpx.Response:
    sent = {"model": "tiny", "prompt": prompt, "seed": seed}
    return httpx.post(f"{url}/v1/images/generations", json=sent, timeout=120)


def generate_by(url: str, prompt: str, seed: int) -> bytes:
    answer = ask(url, prompt, seed)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
    [image] = answer.json()["data"]
    return base64.b64decode(image["b64_json"])


class Cluster:
    """The shared cluster with two more gateways, which are of old or new code, as is the tier.

    A new tier has two replicas, so that the first is up before the old one is stopped.
    """

    def __init__(self, config: dict[str, Any], address: str, folder: Path) -> None:
        self._config = config
        self.url = f"{address}{PREFIX}"
        self._newer = folder / "newer"
        save_newer_code(self._newer)
        self._gateway_args = {
            "tiers": ["tiny"],
            "card": "cpu",
            "num_replicas": 2,
            "public_url": self.url,
            "jobs": {
                "database": f"sqlite:///{folder}/jobs.sqlite3",
                "results": f"{folder}/results",
            },
        }

    def run(self, *, gateways: int, tier: int) -> None:
        """Deploy gateways and tier with these protocols, and wait until they run them."""
        changed = copy.deepcopy(self._config)
        applications = {each["name"]: each for each in changed["applications"]}
        applications["tiny"]["args"] |= {"num_replicas": 1 + tier}
        own = {"name": GATEWAYS, "route_prefix": PREFIX, "args": self._gateway_args}
        applications[GATEWAYS] = applications["gateway"] | own
        for name, version in (("tiny", tier), (GATEWAYS, gateways)):
            if version == NEW:
                path = f"{self._newer}:{ROOT}"
                applications[name]["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
        deploy(changed | {"applications": list(applications.values())})
        wait_until(
            lambda: self._is(tier=tier, gateways=gateways),
            timeout_s=UPGRADE_S,
            what=f"gateways {gateways}, tier {tier}",
        )

    def _is(self, *, tier: int, gateways: int) -> bool:
        from ray import serve

        applications = serve.status().applications
        states = [applications[name].status for name in (GATEWAYS, "tiny")]
        if states != ["RUNNING", "RUNNING"] or not is_ready(self.url):
            return False
        version = httpx.get(f"{self.url}/openapi.json").json()["info"]["version"]
        return (version == VERSION) == (gateways == NEW) and self._protocols() == {PROTOCOL + tier}

    def _protocols(self) -> set[int]:
        """Return the protocols of the tier's replicas, asking some of them at random."""
        from ray import serve

        handle = serve.get_app_handle("tiny").options(method_name="describe")
        calls = [handle.remote(pack_call("tiny", f"test {number}")) for number in range(4)]
        return {call.result(timeout_s=30)["protocol"] for call in calls}


@pytest.fixture
def cluster(address: str, config: dict[str, Any], tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(config, address, tmp_path)
    cluster.run(gateways=OLD, tier=OLD)
    yield cluster
    deploy(config)


@pytest.mark.slow
def test_an_upgrade_of_one_application_after_the_other_fails_and_loses_nothing(
    cluster: Cluster,
) -> None:
    """Gateways, then the tier, then gateways back: old calls new, and new calls old."""
    began_s = time.monotonic()
    expected = [generate_by(cluster.url, PROMPT, seed) for seed in range(NUM_SEEDS)]
    clients = Clients(cluster.url, expected)

    def tell(what: str) -> None:
        took_s = time.monotonic() - began_s
        print(f"\n{took_s:.0f} s: {what}; {clients.num_images} images, {len(clients.jobs)} jobs")

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(clients.keep_generating) for _ in range(2)]
        working.append(threads.submit(clients.keep_ordering))
        try:
            cluster.run(gateways=NEW, tier=OLD)
            tell("new gateways before an old tier")
            refused = ask(cluster.url, f"{PROMPT}, {SHARP}", 1)
            assert refused.status_code == 503, "what the old tier does not know is not ignored"
            assert refused.json()["error"]["code"] == "tier_unavailable"
            assert int(refused.headers["retry-after"]) > 0
            sharp = clients.order(f"{PROMPT}, {SHARP}", 1)

            cluster.run(gateways=NEW, tier=NEW)
            tell("all new")
            assert ask(cluster.url, f"{PROMPT}, {SHARP}", 1).status_code == 200
            assert clients.wait_for(sharp)["status"] == "Ready", "it waited for whoever can"
            clients.finish_jobs()

            cluster.run(gateways=OLD, tier=NEW)
            tell("old gateways before a new tier")
        finally:
            clients.go()
        for each in working:
            each.result()
    assert clients.failures == []
    assert min(clients.num_images, len(clients.jobs)) > 10
