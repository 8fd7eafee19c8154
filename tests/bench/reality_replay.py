"""The client of the reality bench: it sends a trace's requests at their times and measures them."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import httpx

from tests.bench.reality_work import PROMPT, SHAPES, Costs, Measured, Played, Sent, Shape

STAGES = ("encode", "denoise", "decode")
NUM_WARM_UP = 5
NUM_ALONE = 12
# So many clients for each replica that a request is always waiting.
CROWD = 3


@dataclass(frozen=True)
class Answer:
    """An answer: when it came, its latency, and the seconds of its stages in the replica."""

    ended_at: float
    latency_s: float
    service_s: float


async def ask(client: httpx.AsyncClient, url: str, sent: Sent) -> Answer | None:
    """Send a request and return its answer, or None if it was refused.

    The opponents' ingress does not report stages: their seconds are 0.
    """
    headers = {} if sent.deadline_s is None else {"x-flux-deadline-s": f"{sent.deadline_s}"}
    fields = {"prompt": PROMPT, "seed": 1, **sent.shape.fields}
    began = time.perf_counter()
    answer = await client.post(url, json=fields, headers=headers)
    ended_at = time.perf_counter()
    if answer.status_code in (400, 429):
        return None
    said = answer.raise_for_status().headers.get("server-timing", "")
    spent = {part.split(";dur=")[0]: float(part.split("=")[1]) for part in said.split(", ") if part}
    service_s = sum(spent.get(stage, 0.0) for stage in STAGES) / 1000
    return Answer(ended_at, ended_at - began, service_s)


def measure(url: str, num_replicas: int) -> Costs:
    """Measure each shape of request with as many clients as there are replicas, so that none waits.

    The replicas share the CPUs as they will in the trace. In the first rounds the router learns its
    prices.
    """
    between_s = seconds_between(url, num_replicas)
    by_shape: dict[Shape, list[Answer]] = {shape: [] for shape in SHAPES}
    for shape, answer in generate(url, num_replicas, SHAPES):
        by_shape[shape].append(answer)
    return {
        shape: Measured(
            tuple(answer.service_s for answer in answers),
            tuple(answer.latency_s for answer in answers),
            between_s,
        )
        for shape, answers in by_shape.items()
    }


def seconds_between(url: str, num_replicas: int) -> float:
    """Return the seconds for which a replica is idle between two requests while others wait.

    In this time the end of one is reported to the ledger, and the next one is assigned.
    """
    shape = SHAPES[0]
    generated = generate(url, CROWD * num_replicas, (shape,))
    took_s = max(answer.ended_at for _, answer in generated) - min(a.ended_at for _, a in generated)
    return took_s * num_replicas / (len(generated) - 1) - fmean(a.service_s for _, a in generated)


def generate(url: str, num_clients: int, shapes: Sequence[Shape]) -> list[tuple[Shape, Answer]]:
    """Let clients ask again and again, and return the answers but for those of the first rounds."""

    async def one(client: httpx.AsyncClient, number: int) -> list[tuple[Shape, Answer]]:
        generated = []
        for turn in range((NUM_WARM_UP + NUM_ALONE) * len(shapes)):
            shape = shapes[(number + turn) % len(shapes)]
            answer = await ask(client, url, Sent(0.0, shape, None))
            if answer is not None and turn >= NUM_WARM_UP * len(shapes):
                generated.append((shape, answer))
        return generated

    async def all_clients() -> list[tuple[Shape, Answer]]:
        async with httpx.AsyncClient(timeout=600) as client:
            generated = await asyncio.gather(
                *(one(client, number) for number in range(num_clients))
            )
        return list(itertools.chain.from_iterable(generated))

    return asyncio.run(all_clients())


def replay(url: str, trace: Sequence[Sent]) -> Played:
    """Send every request at its time, whether or not earlier ones are done."""

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
