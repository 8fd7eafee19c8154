"""A real Ray with serve/laptop.yaml deployed, shared by the tests of this folder, which run last.

Most tests use `address`, which starts it. Tests that break it wait until it is whole again.
"""

import base64
import copy
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "serve" / "laptop.yaml"
BOOT_S = 400
# How long tests wait for an event that must come: so long that none fails on a slow machine.
PATIENCE_S = 300
# For a program that starts a cluster of several nodes.
PROGRAM_S = 1200
# Tests that change the shared rank group run last, in this order: each begins with the group as the
# one before left it, since starting another group takes as long as a test.
LAST = (
    "2 ranks",
    "test_shared_text_encoder",
    "3 ranks",
    "from_nothing",
    "test_gpu_budget",
    # After it, its tier is deployed once more; the one that follows waits for that anyway.
    "test_rolling_upgrade",
    # It deploys another configuration, and as the last one need not take it back.
    "test_monitoring",
)


def place_of(item: pytest.Item) -> int:
    """Return the place of a test in the order: first other folders, last the shared Ray.

    Between them come the tests of this folder that start a Serve of their own. So the shared Ray
    runs no longer than it is needed.
    """
    if Path(__file__).parent not in item.path.parents:
        return 0
    if "address" not in getattr(item, "fixturenames", ()):
        return 1
    return 2 + sum(number for number, name in enumerate(LAST, 1) if name in item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place_of)


def free_port() -> int:
    """Return a free port below those that the system hands out, and above those of Ray's workers.

    One of Ray's own connections could take any other port while Serve starts.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def wait_until(
    condition: Callable[[], object], *, timeout_s: float = PATIENCE_S, what: str
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def is_ready(address: str) -> bool:
    try:
        # Nothing is encrypted here, and to read certificates takes longer than the answer.
        return httpx.get(f"{address}/readyz", verify=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serve_run(config: Path, home: Path, auth_mode: str = "disabled") -> Iterator[psutil.Popen]:
    """Run `serve run CONFIG` with a home and a Ray of its own; kill what is left at the end."""
    env = {"HOME": str(home), "RAY_AUTH_MODE": auth_mode, "RAY_ADDRESS": "local"}
    env["RAY_worker_niceness"] = "0"
    serve = psutil.Popen(
        [Path(sys.executable).parent / "serve", "run", config],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell that runs the tests in the background makes its processes ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield serve
    finally:
        if serve.is_running():
            for process in (*serve.children(recursive=True), serve):
                process.kill()
            serve.wait(PATIENCE_S)


def figures_of_program(
    module: str, *args: str, env: dict[str, str] | None = None, timeout_s: float = PROGRAM_S
) -> dict[str, Any]:
    """Run a module that starts a Ray of its own, and return the JSON object that it prints.

    Raise AssertionError if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr, file=sys.stderr)
    # Ray writes other lines to stdout too.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    figures: dict[str, Any] = json.loads(line)
    return figures


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def wait_until_ready() -> Callable[[str], None]:
    """Return `wait_until_ready(address)`, which waits until a tier can serve there."""

    def wait(address: str) -> None:
        wait_until(lambda: is_ready(address), timeout_s=BOOT_S, what="a tier that can serve")

    return wait


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the gateway records the requests that arrive."""
    return tmp_path_factory.mktemp("cluster") / "traces"


@pytest.fixture(scope="session")
def config(traces: Path) -> dict[str, Any]:
    """Return serve/laptop.yaml on a free port, with aliases and a recorder, for temporary folders.

    The ranks of `tiny-tp2` fail on demand (faulty.py), and use so little of the CPUs that there is
    room for a third rank.
    """
    config = yaml.safe_load(LAPTOP.read_text())
    config["http_options"]["port"] = free_port()
    gateway, _, group = config["applications"]
    group["import_path"] = "tests.cluster.faulty:build_tier"
    group["args"]["num_cpus"] = 0.25
    args = gateway["args"]
    studio = {"tiers": ["tiny-tp2", "tiny"], "policy": "cascade"}
    args["aliases"] = {"studio": studio, "flux-dev": "tiny", "flux-kontext-pro": "tiny"}
    args["public_url"] = f"http://127.0.0.1:{config['http_options']['port']}"
    kept = traces.parent / "jobs"
    args["jobs"] = {"database": f"sqlite:///{kept}/jobs.sqlite3", "results": f"{kept}/results"}
    args["record_to"] = str(traces)
    return config


def backlog(tier: str) -> tuple[float, float]:
    """Return the GPU seconds of a tier's waiting and of its running requests in the ledger."""
    import ray

    from flux_ray.router.ledger.remote import start_ledger

    known = ray.get(start_ledger().backlog.remote(tier), timeout=PATIENCE_S)
    return known.waiting_s, known.running_s


# The config that was deployed last.
DEPLOYED: dict[str, Any] = {}


def deploy(config: dict[str, Any]) -> None:
    """Deploy as `serve deploy` does: only applications that changed are started anew."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    DEPLOYED.clear()
    DEPLOYED.update(copy.deepcopy(config))


@contextmanager
def more_gateways(
    config: dict[str, Any], url: str, name: str, args: dict[str, Any]
) -> Iterator[None]:
    """Deploy gateways with `args` that answer below `url`, as an application beside `config`'s."""
    changed = copy.deepcopy(config)
    (gateway,) = (app for app in config["applications"] if app["name"] == "gateway")
    prefix = urlsplit(url).path
    changed["applications"].append(gateway | {"name": name, "route_prefix": prefix, "args": args})
    deploy(changed)
    wait_until(lambda: is_ready(url), what=name)
    yield
    deploy(config)


def are_running(status: Any) -> bool:
    """Return whether all applications are running."""
    return {application.status for application in status.applications.values()} == {"RUNNING"}


@pytest.fixture(scope="session")
def address(config: dict[str, Any], wait_until_ready: Callable[[str], None]) -> Iterator[str]:
    """Start the shared Ray and Serve as `serve run` does, on 2 CPUs; yield the gateway's URL.

    Every tier is running when this yields.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        namespace="serve",
        # By default Ray's workers get a niceness of 15: anything else on the machine would come
        # first.
        _system_config={"worker_niceness": 0},
    )
    serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
    deploy(config)
    address = f"http://127.0.0.1:{config['http_options']['port']}"
    wait_until_ready(address)
    wait_until(lambda: are_running(serve.status()), timeout_s=BOOT_S, what="every tier")
    yield address
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def generate(address: str) -> Callable[..., list[bytes]]:
    """Return `generate(prompt, seed=1, ...)`, which asks by plain HTTP and returns image files."""

    def generate(prompt: str, **fields: object) -> list[bytes]:
        answer = httpx.post(
            f"{address}/v1/images/generations",
            json={"model": "tiny", "prompt": prompt, **fields},
            timeout=PATIENCE_S,
        )
        assert answer.status_code == 200, answer.text
        return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]

    return generate


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[bytes], np.ndarray]:
    """Return a function from an image file to its pixels, [height, width, 3]."""
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@dataclass(frozen=True)
class Replica:
    """The processes of one replica."""

    leader: psutil.Process
    ranks: tuple[psutil.Process, ...]

    @property
    def processes(self) -> tuple[psutil.Process, ...]:
        return (self.leader, *self.ranks)

    def busy_s(self) -> float:
        """Return the CPU seconds of the ranks, which hardly depend on how busy the machine is."""
        times = [rank.cpu_times() for rank in self.ranks]
        return sum(each.user + each.system for each in times)


@pytest.fixture(scope="session")
def replicas(address: str) -> Callable[..., list[Replica]]:
    """Return `replicas("tiny")`, which finds the live replicas of a tier.

    With a second argument it finds those of another deployment of the tier's application.
    """
    from ray._private.state import state

    def of(tier: str, deployment: str | None = None) -> list[Replica]:
        actors = state.actor_table(None, actor_state_name="ALIVE").values()
        actors = [actor for actor in actors if psutil.pid_exists(actor["Pid"])]
        return [
            Replica(
                psutil.Process(leader["Pid"]),
                tuple(
                    psutil.Process(actor["Pid"])
                    for actor in actors
                    if actor["OwnerAddress"] == leader["Address"]
                ),
            )
            for leader in actors
            if leader["ActorClassName"] == f"ServeReplica:{tier}:{deployment or tier}"
        ]

    return of
