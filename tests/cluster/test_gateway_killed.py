"""A gateway, or a proxy, is killed under its requests: what clients are told, and what they get."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from flux_ray.config.tier import PROXY_CALLBACK, READ_WITH_H11
from tests.cluster.conftest import LAPTOP, PATIENCE_S, free_port, is_ready, serve_run, wait_until
from tests.cluster.counted import GENERATED

NUM_CLIENTS = 12
# A part of the environment that `make serve` sets.
ENVIRONMENT = {
    PROXY_CALLBACK: READ_WITH_H11,
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
}
BODY: dict[str, Any] = {"size": "192x192", "steps": 40}


class Server:
    """`serve run` with two gateways and one replica, in a home of its own."""

    def __init__(self, serve: psutil.Popen, address: str, home: Path) -> None:
        self.serve = serve
        self.address = address
        self.generated_at = home / GENERATED

    def generated(self, prompt: str) -> list[str]:
        """Return the seeds of the requests that were generated to their end, in order."""
        lines = self.generated_at.read_text().splitlines() if self.generated_at.exists() else []
        return [line.rpartition(" ")[2] for line in lines if line.startswith(f"{prompt} ")]

    def processes(self, name: str) -> list[psutil.Process]:
        """Return Ray's processes whose name begins with `name`."""
        found = []
        for each in self.serve.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "".join(each.cmdline()[:1]).startswith(name):
                    found.append(each)
        return found

    def post(self, prompt: str, headers: dict[str, str], **fields: object) -> httpx.Response:
        """Send one request; the client gives up no sooner than the gateway."""
        path = f"{self.address}/v1/images/generations"
        body = BODY | {"prompt": prompt} | fields
        return httpx.post(path, json=body, headers=headers, timeout=2 * PATIENCE_S)

    def insist(self, prompt: str, key: str, **fields: object) -> list[httpx.Response]:
        """Repeat a request whenever the answer says so, until it has images; return all answers."""
        answers = [self.post(prompt, {"idempotency-key": key}, **fields)]
        while answers[-1].status_code != 200:
            assert len(answers) < 60, [answer.text for answer in answers]
            time.sleep(float(answers[-1].headers["retry-after"]))
            answers.append(self.post(prompt, {"idempotency-key": key}, **fields))
        return answers

    def wait_for_gateways(self, number: int) -> None:
        """Wait until so many gateways are up and answer."""
        wait_until(lambda: len(self.processes("ray::ServeReplica:gateway")) == number, what="both")
        wait_until(lambda: is_ready(self.address), what="a gateway that is ready")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, wait_until_ready: Callable[[str], None]
) -> Iterator[Server]:
    home, port = tmp_path_factory.mktemp("home"), free_port()
    config = yaml.safe_load(LAPTOP.read_text().replace("8000", str(port)))
    gateway, tiny, _ = config["applications"]
    config["applications"] = [gateway, tiny]
    gateway["args"] |= {"tiers": ["tiny"], "num_replicas": 2}
    gateway["args"].pop("jobs")
    tiny["import_path"] = "tests.cluster.counted:build_tier"
    file = home / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with serve_run(file, home) as serve:
            server = Server(serve, f"http://127.0.0.1:{port}", home)
            wait_until_ready(server.address)
            yield server


def kill_a_gateway_under(
    server: Server, prompt: str, ask: Callable[[int], list[httpx.Response]]
) -> list[list[httpx.Response]]:
    """Kill a gateway while clients wait; return each client's answers, one for each try."""
    server.wait_for_gateways(2)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asking = [pool.submit(ask, number) for number in range(NUM_CLIENTS)]
        wait_until(lambda: len(server.generated(prompt)) >= 2, what="the first images")
        server.processes("ray::ServeReplica:gateway")[0].kill()
        return [each.result() for each in asking]


def check_is_typed(answer: httpx.Response) -> None:
    """Check that OpenAI's client can read the error, and learns that it may retry."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["x-request-id"]
    assert answer.json()["error"]["code"] == "gateway_failed"


@pytest.mark.slow
def test_who_comes_again_gets_the_image_that_was_generated(server: Server) -> None:
    """No image is generated twice: the waiting ones had not begun, and the running one goes on."""
    prompt = "a red circle"

    told = kill_a_gateway_under(
        server, prompt, lambda number: server.insist(prompt, f"image-{number}")
    )
    failed = [answer for answers in told for answer in answers[:-1]]
    assert failed, "none was in flight at the gateway that was killed"
    for answer in failed:
        check_is_typed(answer)
    seeds = [str(answers[-1].json()["data"][0]["seed"]) for answers in told]
    assert sorted(server.generated(prompt)) == sorted(seeds)
    assert len(set(seeds)) == NUM_CLIENTS
    print(f"{len(failed)} of {NUM_CLIENTS} lost their gateway, and {len(seeds)} images were drawn")


@pytest.mark.slow
def test_a_replica_goes_on_when_no_gateway_is_left(server: Server) -> None:
    """Its image goes to the client that asks again, at a gateway that never saw the first try."""
    prompt = "a green star"
    server.wait_for_gateways(2)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.insist, prompt, "alone", n=8, steps=50)
        # By then it runs, as nothing else waits; it takes longer than a second.
        time.sleep(1)
        for gateway in server.processes("ray::ServeReplica:gateway"):
            gateway.kill()
        assert server.generated(prompt) == [], "it was over too soon to tell anything"
        answers = asking.result()
    check_is_typed(answers[0])
    seed = answers[-1].json()["data"][0]["seed"]
    assert server.generated(prompt) == [str(seed)]


@pytest.mark.slow
def test_who_named_nothing_is_told_to_come_again(server: Server) -> None:
    prompt = "a blue ring"
    told = kill_a_gateway_under(server, prompt, lambda number: [server.post(prompt, {})])
    failed = [answer for [answer] in told if answer.status_code != 200]
    assert failed, "none was in flight at the gateway that was killed"
    for answer in failed:
        check_is_typed(answer)


@pytest.mark.slow
def test_a_dead_proxy_is_replaced(
    server: Server, record_property: Callable[[str, object], None]
) -> None:
    """A node's proxy is the only way into it. On a quiet machine a new one takes 5 seconds."""
    server.wait_for_gateways(2)
    server.processes("ray::ProxyActor")[0].kill()
    began_s = time.monotonic()
    wait_until(lambda: not is_ready(server.address), what="the proxy's end")
    wait_until(lambda: is_ready(server.address), what="another proxy")
    took_s = time.monotonic() - began_s
    record_property("proxy_back_s", took_s)
    print(f"the next answer came {took_s:.1f} s after the proxy was killed")
