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


def measure(url: str, num_at_once: int) -> Costs:
    """Shapes drawn in turns by so many clients, none of which waits for another's replica.

    As many as there are replicas: they share the processors. The first rounds warm the prices up.
    """

    async def draw(client: httpx.AsyncClient, number: int) -> list[tuple[Shape, Answer]]:
        drawn = []
        for turn in range((NUM_WARM_UP + NUM_ALONE) * len(SHAPES)):
            shape = SHAPES[(number + turn) % len(SHAPES)]
            answer = await ask(client, url, Sent(0.0, shape, None))
            if answer is not None and turn >= NUM_WARM_UP * len(SHAPES):
                drawn.append((shape, answer))
        return drawn

    async def all_clients() -> list[list[tuple[Shape, Answer]]]:
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(*(draw(client, number) for number in range(num_at_once)))

    by_shape: dict[Shape, list[Answer]] = {shape: [] for shape in SHAPES}
    for drawn in asyncio.run(all_clients()):
        for shape, answer in drawn:
            by_shape[shape].append(answer)
    return {shape: measured(answers) for shape, answers in by_shape.items()}


def measured(answers: Sequence[Answer]) -> Measured:
    """The answers of one shape."""
    return Measured(
        tuple(answer.service_s for answer in answers),
        tuple(answer.gateway_s for answer in answers),
        tuple(answer.latency_s for answer in answers),
    )


def replay(url: str, trace: Sequence[Sent]) -> Played:
    """Every request at its time, whether or not others are done."""

    async def at_its_time(client: httpx.AsyncClient, sent: Sent, began: float) -> Answer | None:
        await asyncio.sleep(began + sent.at_s - time.perf_counter())
        return await ask(client, url, sent)

    async def all_requests() -> list[Answer | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            await ask(client, url, Sent(0.0, SHAPES[0], None))
            began = time.perf_counter()
            return await asyncio.gather(*(at_its_time(client, sent, began) for sent in trace))

    answers = asyncio.run(all_requests())
    return Played(
        tuple(trace),
        tuple(answer and answer.latency_s for answer in answers),
        tuple(answer and answer.service_s for answer in answers),
    )
