"""Hands in many jobs with large references at once, and sees how much memory the gateway takes."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from flux_ray.config.gateway import GatewayArgs, JobArgs, Limits

TIER = "flux-2-dev"
ROOT = Path(__file__).parents[2]
POLL_S = 0.5
# Of a gateway that closed the connection instead of reading on.
AGAIN_S = 2.0


@dataclass(frozen=True)
class Load:
    """So many jobs, with so many references of that size each."""

    num_jobs: int
    num_references: int
    width: int = 5000
    height: int = 4000


@dataclass
class Seen:
    """What came of it. Bytes are of resident memory."""

    idle_bytes: int = 0
    peak_bytes: int = 0
    num_ready: int = 0
    num_refused: int = 0
    num_cut_off: int = 0
    seconds: float = 0.0


def large_jpeg(width: int, height: int, seed: int) -> bytes:
    """An image with something everywhere, of few bytes a pixel."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 400, width // 400, 3), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", quality=40)
    return file.getvalue()


def args_for(folder: Path, limits: Limits) -> GatewayArgs:
    jobs = JobArgs(database=f"sqlite:///{folder}/jobs.sqlite3", results=f"{folder}/results")
    url = "http://127.0.0.1"
    return GatewayArgs(tiers=(TIER,), public_url=url, jobs=jobs, limits=limits)


@contextmanager
def gateway(args: GatewayArgs) -> Iterator[tuple[str, int]]:
    """Its URL and its process id."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        descriptor = listener.fileno()
        code = [sys.executable, "-m", "tests.jobs.lone_gateway", args.model_dump_json()]
        # As `make serve` has it.
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*code, str(descriptor)], pass_fds=(descriptor,), env=environment, cwd=ROOT
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", process.pid
        finally:
            process.terminate()
            process.wait(30)


def resident_bytes(pid: int, name: str) -> int:
    """`VmRSS` is of now, `VmHWM` the most that there ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


async def hand_in(client: httpx.AsyncClient, body: bytes, seen: Seen) -> str:
    """The job's id, after as many refusals as there are."""
    while True:
        try:
            headers = {"content-type": "application/json"}
            answer = await client.post(f"/v1/{TIER}", content=body, headers=headers)
        except httpx.TransportError:
            # A gateway that refuses does not read the rest.
            seen.num_cut_off += 1
            await asyncio.sleep(AGAIN_S)
            continue
        if answer.status_code in (429, 503):
            seen.num_refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
            continue
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]


async def wait_until_ready(client: httpx.AsyncClient, job_id: str) -> bool:
    while True:
        result = (await client.get("/v1/get_result", params={"id": job_id})).json()
        if result["status"] != "Pending":
            return result["status"] == "Ready"
        await asyncio.sleep(POLL_S)


def bodies_for(load: Load) -> list[bytes]:
    """Each job's references are its own, and no two of them the same."""
    images = [large_jpeg(load.width, load.height, seed) for seed in range(load.num_references)]
    texts = [base64.b64encode(image).decode() for image in images]
    names = ["input_image", *(f"input_image_{n}" for n in range(2, load.num_references + 1))]
    fields = dict(zip(names, texts, strict=True))
    return [
        json.dumps(
            {"prompt": f"no. {seed}", "seed": seed, "width": 1024, "height": 1024} | fields
        ).encode()
        for seed in range(load.num_jobs)
    ]


async def measure(load: Load, folder: Path, limits: Limits) -> Seen:
    """Hand all of them in at once, and wait until each is done."""
    seen, bodies = Seen(), bodies_for(load)
    with gateway(args_for(folder, limits)) as (url, pid):
        async with httpx.AsyncClient(
            base_url=url, timeout=None, limits=httpx.Limits(max_connections=None), trust_env=False
        ) as client:
            assert (await client.get("/health")).status_code == 200
            seen.idle_bytes = resident_bytes(pid, "VmRSS")
            began = time.monotonic()
            job_ids = await asyncio.gather(*(hand_in(client, body, seen) for body in bodies))
            ready = await asyncio.gather(*(wait_until_ready(client, each) for each in job_ids))
            seen.seconds = time.monotonic() - began
            seen.num_ready = sum(ready)
            seen.peak_bytes = resident_bytes(pid, "VmHWM")
    return seen
