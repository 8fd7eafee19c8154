"""Measure the errors of the cost model's prices for `tiny`, before and after it has learned.

Each request runs three times through the engine's stages, on one thread, as a rank runs it.
Requests to learn from and held-out ones alternate, so that both see the same machine. A price is
compared with each run and with the median of a request's three runs; for reference, so is each run
with its own median. Other programs on the machine are no error of a price: the thread's own clock
leaves most of them out, the wall clock does not.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.images import encode_image
from flux_ray.engine.registry import Adapter, load_adapter
from flux_ray.request import ImageRequest, RgbImage, StageTimes
from flux_ray.router.pricing.cost import ReplicaSpec, price, work_of
from flux_ray.router.pricing.cost_model import CostModel, Observation

TINY = tier_for("tiny")
LAYOUT = ReplicaSpec.of(TierArgs(tier="tiny", device="cpu", dtype="float32"), "cpu")
# Sides in pixels. Every second one occurs only in held-out requests.
SIDES = (64, 80, 96, 112, 128, 144, 160, 176, 192)
NUM_REQUESTS = 240
NUM_ROUNDS = 3
WARM_UP = 5
CLOCKS = {"thread": time.thread_time, "wall": time.perf_counter}
Times = dict[str, StageTimes]


@dataclass(frozen=True)
class Generated:
    """A request and the seconds of its stages, for each round and by each clock.

    `is_new_size`: its sides occur in no request that is learned from.
    """

    request: ImageRequest
    is_held_out: bool
    is_new_size: bool
    times: list[Times] = field(default_factory=list)

    def seconds(self, clock: str) -> list[float]:
        """Return the seconds of all stages together, one value for each round."""
        by_clock = [each[clock] for each in self.times]
        return [each.encode_s + each.denoise_s + each.decode_s for each in by_clock]


def random_request(dice: random.Random, number: int, sides: tuple[int, ...]) -> ImageRequest:
    """Return a random request: of these sides, 0 to 2 references, 1 to 8 steps, 1 or 2 images."""
    references = []
    for _ in range(dice.randrange(3)):
        width, height = dice.choice(sides), dice.choice(sides)
        references.append(RgbImage(width, height, dice.randbytes(width * height * 3)))
    return ImageRequest(
        request_id=str(number),
        tier="tiny",
        prompt=f"a {dice.choice(('red', 'green', 'blue'))} circle on a white background",
        width=dice.choice(sides),
        height=dice.choice(sides),
        num_steps=dice.randint(1, 8),
        guidance=1.0,
        seed=number,
        num_images=dice.randint(1, 2),
        references=tuple(references),
    )


def generate(adapter: Adapter, request: ImageRequest) -> Times:
    """Run the stages of a request one after the other, and return their times by each clock."""
    stages = ("encode", "denoise", "decode")
    seconds = {clock: dict.fromkeys(stages, 0.0) for clock in CLOCKS}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        began = {clock: now() for clock, now in CLOCKS.items()}
        answer = call()
        for clock, now in CLOCKS.items():
            seconds[clock][stage] += now() - began[clock]
        return answer

    canvas = ImageSpec(request.width, request.height, request.num_steps)
    given = timed(
        "encode",
        lambda: adapter.encode(adapter.encode_prompt(request.prompt), request.references),
    )
    for seed in request.seeds:
        state = timed("encode", lambda seed=seed: adapter.prepare(given, canvas, seed))
        while not state.is_done:
            state = timed("denoise", lambda state=state: adapter.denoise(state))
        timed("decode", lambda state=state: encode_image(adapter.decode(state), request.encoding))
    return {
        clock: StageTimes(0.0, *(spent[stage] for stage in stages))
        for clock, spent in seconds.items()
    }


def requests() -> list[Generated]:
    """Return the requests: every second one is held out, and half of those have new sizes."""
    dice = random.Random(0)
    generated = []
    for number in range(NUM_REQUESTS):
        is_new_size = number % 4 == 3
        request = random_request(dice, number, SIDES[1::2] if is_new_size else SIDES[::2])
        generated.append(Generated(request, number % 2 == 1, is_new_size))
    return generated


def spread(wrong: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    return {"median": statistics.median(wrong), "p95": statistics.quantiles(wrong, n=20)[-1]}


def errors(
    generated: list[Generated], clock: str, predict: Callable[[Generated], float]
) -> dict[str, dict[str, float]]:
    """Return |predicted / measured - 1| for single runs, and for the median run of each request."""
    single, median = [], []
    for each in generated:
        predicted, measured = predict(each), each.seconds(clock)
        single += [abs(predicted / seconds - 1) for seconds in measured]
        median.append(abs(predicted / statistics.median(measured) - 1))
    return {"single": spread(single), "median_of_rounds": spread(median)}


def generate_all(adapter: Adapter) -> list[Generated]:
    """Run all requests in rounds, and return them with their times."""
    dice = random.Random(1)
    for number in range(WARM_UP):
        generate(adapter, random_request(dice, number, SIDES))
    generated = requests()
    for _ in range(NUM_ROUNDS):
        for each in generated:
            each.times.append(generate(adapter, each.request))
    return generated


def learn(model: CostModel, generated: list[Generated], clock: str) -> dict[str, float]:
    """Let the model learn in the order of the runs; return the median error of each stage.

    It is the error that the router's metric shows.
    """
    seen: list[Observation] = []
    for number in range(NUM_ROUNDS):
        for each in generated:
            seen.extend(model.learn(each.request, each.times[number][clock]))
    return {
        stage: statistics.median(one.error for one in seen if one.stage == stage)
        for stage in ("encode", "denoise", "decode")
    }


def report(generated: list[Generated], clock: str) -> dict[str, object]:
    """Print and return the figures by one clock."""
    model = CostModel({"tiny": LAYOUT})
    held_out = [each for each in generated if each.is_held_out]
    learned_from = [each for each in generated if not each.is_held_out]
    learn(model, learned_from, clock)
    groups = {
        "held out": held_out,
        "of sizes learned": [each for each in held_out if not each.is_new_size],
        "of new sizes": [each for each in held_out if each.is_new_size],
    }
    ways: dict[str, Callable[[Generated], float]] = {
        "before": lambda each: price(work_of(each.request), LAYOUT).total_s,
        "after": lambda each: model.price(each.request).total_s,
        "own median": lambda each: statistics.median(each.seconds(clock)),
    }
    figures: dict[str, object] = {"num_learned": NUM_ROUNDS * len(learned_from)}
    print(f"{clock:18} {'predicted':11} single: median   p95   of 3: median   p95")
    for name, group in groups.items():
        for way, predict in ways.items():
            wrong = errors(group, clock, predict)
            single, median = wrong["single"], wrong["median_of_rounds"]
            print(
                f"{name:18} {way:11} {single['median']:14.3f} {single['p95']:5.3f}"
                f" {median['median']:14.3f} {median['p95']:5.3f}"
            )
            figures[f"{name}.{way}".replace(" ", "_")] = wrong
    # This comes last, since the model learns from the held-out requests here.
    figures["stage_log_error"] = learn(model, held_out, clock)
    print(f"median |ln(measured / predicted)|: {figures['stage_log_error']}")
    return figures


def main() -> None:
    torch.set_num_threads(1)
    generated = generate_all(load_adapter(TINY, None, Placement("float32", "cpu")))
    print(json.dumps({clock: report(generated, clock) for clock in CLOCKS}))


if __name__ == "__main__":
    main()
