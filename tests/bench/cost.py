"""How wrong prices of `tiny` are on one thread of this machine, before and after it has learned.

Requests are drawn through the engine's stages as a rank makes them, all of them in three rounds;
what is held out takes turns with what is learned from, so that both see the same machine. A price
is held against each single draw, and against the median of a request's three; how far single draws
are from their own median is printed beside it. What others do on the machine meanwhile is no error
of the price: by the thread's own clock most of that is left out, by the wall's it is not.
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
from flux_ray.engine.api import ImageSpec
from flux_ray.engine.images import encode_image
from flux_ray.engine.loading import Placement
from flux_ray.engine.registry import Adapter, load_adapter
from flux_ray.request import ImageRequest, RgbImage, StageTimes
from flux_ray.router.pricing.cost import ReplicaSpec, price, work_of
from flux_ray.router.pricing.cost_model import CostModel, Observation

TINY = tier_for("tiny")
LAYOUT = ReplicaSpec.of(TierArgs(tier="tiny", device="cpu", dtype="float32"), "cpu")
# Every second one is seen only by requests that are held out.
SIDES = (64, 80, 96, 112, 128, 144, 160, 176, 192)
NUM_REQUESTS = 240
NUM_ROUNDS = 3
WARM_UP = 5
CLOCKS = {"thread": time.thread_time, "wall": time.perf_counter}
Times = dict[str, StageTimes]


@dataclass(frozen=True)
class Generated:
    """A request and what it took, round by round, by each clock.

    `is_new_size`: its sides are of those that nothing was learned from.
    """

    request: ImageRequest
    is_held_out: bool
    is_new_size: bool
    times: list[Times] = field(default_factory=list)

    def seconds(self, clock: str) -> list[float]:
        """Of all stages, round by round."""
        by_clock = [each[clock] for each in self.times]
        return [each.encode_s + each.denoise_s + each.decode_s for each in by_clock]


def random_request(dice: random.Random, number: int, sides: tuple[int, ...]) -> ImageRequest:
    """Any size of those sides, 0 to 2 references, 1 to 8 steps, one or two images."""
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
    """The stages of one request one after the other, timed as the step loop does."""
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
    """Learned from, held out of the same sizes, learned from, held out of new sizes, and so on."""
    dice = random.Random(0)
    generated = []
    for number in range(NUM_REQUESTS):
        is_new_size = number % 4 == 3
        request = random_request(dice, number, SIDES[1::2] if is_new_size else SIDES[::2])
        generated.append(Generated(request, number % 2 == 1, is_new_size))
    return generated


def spread(wrong: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"median": statistics.median(wrong), "p95": statistics.quantiles(wrong, n=20)[-1]}


def errors(
    generated: list[Generated], clock: str, predict: Callable[[Generated], float]
) -> dict[str, dict[str, float]]:
    """|predicted / measured - 1| of single draws, and of the median draw."""
    single, median = [], []
    for each in generated:
        predicted, measured = predict(each), each.seconds(clock)
        single += [abs(predicted / seconds - 1) for seconds in measured]
        median.append(abs(predicted / statistics.median(measured) - 1))
    return {"single": spread(single), "median_of_rounds": spread(median)}


def generate_all(adapter: Adapter) -> list[Generated]:
    """All requests with their times."""
    dice = random.Random(1)
    for number in range(WARM_UP):
        generate(adapter, random_request(dice, number, SIDES))
    generated = requests()
    for _ in range(NUM_ROUNDS):
        for each in generated:
            each.times.append(generate(adapter, each.request))
    return generated


def learn(model: CostModel, generated: list[Generated], clock: str) -> dict[str, float]:
    """Teach it in the order of drawing; the median error of each stage, as the metric has it."""
    seen: list[Observation] = []
    for number in range(NUM_ROUNDS):
        for each in generated:
            seen.extend(model.learn(each.request, each.times[number][clock]))
    return {
        stage: statistics.median(one.error for one in seen if one.stage == stage)
        for stage in ("encode", "denoise", "decode")
    }


def report(generated: list[Generated], clock: str) -> dict[str, object]:
    """The figures by one clock, printed."""
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
    # Last, for it learns from what was held out.
    figures["stage_log_error"] = learn(model, held_out, clock)
    print(f"median |ln(measured / predicted)|: {figures['stage_log_error']}")
    return figures


def main() -> None:
    torch.set_num_threads(1)
    generated = generate_all(load_adapter(TINY, None, Placement("float32", "cpu")))
    print(json.dumps({clock: report(generated, clock) for clock in CLOCKS}))


if __name__ == "__main__":
    main()
