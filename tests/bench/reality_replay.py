"""The client of the reality bench: asks at the times of a trace, over HTTP, and reads the clock."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from tests.bench.reality_work import PROMPT, SHAPES, Costs, Measured, Played, Sent, Shape

STAGES = ("encode", "denoise", "decode")
NUM_WARM_UP = 5
NUM_ALONE = 12


@dataclass(frozen=True)
class Answer:
    """Seconds of the whole answer, of its stages in the replica, and in the gateway."""

    latency_s: float
    service_s: float
    gateway_s: float


async def ask(client: httpx.AsyncClient, url: str, sent: Sent) -> Answer | None:
    """None if it was refused. An opponent's ingress says nothing of stages."""
    headers = {} if sent.deadline_s is None else {"x-flux-deadline-s": f"{sent.deadline_s}"}
    fields = {"prompt": PROMPT, "seed": 1, **sent.shape.fields}
    began = time.perf_counter()
    answer = await client.post(url, json=fields, headers=headers)
    latency_s = time.perf_counter() - began
    if answer.status_code in (400, 429):
        return None
    said = answer.raise_for_status().headers.get("server-timing", "")
    spent = {part.split(";dur=")[0]: float(part.split("=")[1]) for part in said.split(", ") if part}
    service_s = sum(spent.get(stage, 0.0) for stage in STAGES) / 1000
    return Answer(latency_s, service_s, spent.get("total", 0.0) / 1000)


def measure(url: str) -> Costs:
    """Every shape alone on the idle cluster, one by one; a first round warms the prices up."""

    async def drawn(client: httpx.AsyncClient, shape: Shape, num: int) -> Measured:
        answers = [await ask(client, url, Sent(0.0, shape, None)) for _ in range(num)]
        served = [answer for answer in answers if answer is not None]
        return Measured(
            tuple(answer.service_s for answer in served),
            tuple(answer.gateway_s for answer in served),
            tuple(answer.latency_s for answer in served),
        )

    async def all_shapes() -> Costs:
        async with httpx.AsyncClient(timeout=600) as client:
            for shape in SHAPES:
                await drawn(client, shape, NUM_WARM_UP)
            return {shape: await drawn(client, shape, NUM_ALONE) for shape in SHAPES}

    return asyncio.run(all_shapes())


def replay(url: str, trace: Sequence[Sent]) -> Played:
    """Every request at its time, whether or not others are done."""

    async def at_its_time(client: httpx.AsyncClient, sent: Sent, began: float) -> float | None:
        await asyncio.sleep(began + sent.at_s - time.perf_counter())
        answer = await ask(client, url, sent)
        return None if answer is None else answer.latency_s

    async def all_requests() -> list[float | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            await ask(client, url, Sent(0.0, SHAPES[0], None))
            began = time.perf_counter()
            return await asyncio.gather(*(at_its_time(client, sent, began) for sent in trace))

    return Played(tuple(trace), tuple(asyncio.run(all_requests())))
