"""Measure seconds per image of `tiny` in diffusers' pipeline, in our engine, and over HTTP.

The three take turns, and ratios are printed. It also measures images per second of one replica,
with the files made outside of its rank and on it (latency_load.py).
"""

import base64
import io
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"

import httpx
import numpy as np
import ray
import torch
from PIL import Image
from ray import serve

from flux_ray.app import build_gateway
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import TierArgs
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.registry import load_adapter
from flux_ray.request import RgbImage
from flux_ray.tiny import KLEIN_CHECKPOINT, evaluate
from tests.bench.latency_load import images_per_s, tier_of_all_ways

NUM_ROUNDS = 30
PROMPT = "a red circle on a blue background"
EDIT = "make the circle green"
TINY = tier_for("tiny")


def generate_with_pipeline() -> Callable[[str, RgbImage | None], np.ndarray]:
    pipeline = evaluate.load_pipeline(KLEIN_CHECKPOINT)

    def generate(prompt: str, reference: RgbImage | None) -> np.ndarray:
        image = reference and Image.frombytes("RGB", (128, 128), reference.rgb)
        generated = pipeline(
            prompt=prompt,
            image=image,
            height=128,
            width=128,
            num_inference_steps=TINY.num_steps,
            guidance_scale=TINY.guidance,
            max_sequence_length=TINY.text_length,
            generator=torch.Generator().manual_seed(7),
        )
        return np.asarray(generated.images[0])

    return generate


def generate_with_engine() -> Callable[[str, RgbImage | None], np.ndarray]:
    adapter = load_adapter(TINY, None, Placement("float32", "cpu"))

    def generate(prompt: str, reference: RgbImage | None) -> np.ndarray:
        references = () if reference is None else (reference,)
        conditioning = adapter.encode(adapter.encode_prompt(prompt), references)
        state = adapter.prepare(conditioning, ImageSpec(128, 128, TINY.num_steps), 7)
        while not state.is_done:
            state = adapter.denoise(state)
        return np.frombuffer(adapter.decode(state).rgb, np.uint8).reshape(128, 128, 3)

    return generate


def start_serving() -> str:
    """Start one replica of `tiny` and a gateway, and return the gateway's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    tier = tier_of_all_ways(TierArgs(tier="tiny", device="cpu", dtype="float32"))
    serve.run(tier, name="tiny", route_prefix=None)
    serve.run(build_gateway(GatewayArgs(tiers=("tiny",))), name="gateway")
    return f"http://127.0.0.1:{port}"


def generate_over_http(address: str) -> Callable[[str, RgbImage | None], np.ndarray]:
    client = httpx.Client(base_url=address, timeout=60)

    def generate(prompt: str, reference: RgbImage | None) -> np.ndarray:
        fields = {"prompt": prompt, "seed": 7}
        if reference is None:
            answer = client.post("/v1/images/generations", json=fields)
        else:
            file = io.BytesIO()
            Image.frombytes("RGB", (128, 128), reference.rgb).save(file, "PNG")
            answer = client.post(
                "/v1/images/edits", data=fields, files={"image": ("a.png", file.getvalue())}
            )
        data = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data)))

    return generate


def main() -> None:
    torch.set_num_threads(1)
    address = start_serving()
    ways = {
        "pipeline": generate_with_pipeline(),
        "engine": generate_with_engine(),
        "http": generate_over_http(address),
    }
    red = ways["pipeline"](PROMPT, None)
    figures: dict[str, object] = {}
    print(f"{'task':12} {'way':10} {'median s':>9} {'best s':>8} {'ratio':>6}  same pixels")
    for task, prompt, reference in (
        ("generation", PROMPT, None),
        ("edit", EDIT, RgbImage(128, 128, red.tobytes())),
    ):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        images = {}
        for _ in range(NUM_ROUNDS):
            for way, generate in ways.items():
                began = time.perf_counter()
                images[way] = generate(prompt, reference)
                seconds[way].append(time.perf_counter() - began)
        for way, taken in seconds.items():
            median, best = statistics.median(taken), min(taken)
            ratio = median / statistics.median(seconds["pipeline"])
            same = bool(np.array_equal(images[way], images["pipeline"]))
            print(f"{task:12} {way:10} {median:9.4f} {best:8.4f} {ratio:6.2f}  {same}")
            figures[f"{task}.{way}"] = {
                "median_s": median,
                "best_s": best,
                "ratio": ratio,
                "same_pixels": same,
            }
    print(f"{'images/s, 8 clients':24} {'median':>8} {'ratio':>6}")
    for way, found in (rates := images_per_s(address)).items():
        print(f"{way:24} {found['images_per_s']:8.2f} {found['ratio']:6.2f}")
    serve.shutdown()
    ray.shutdown()
    print(json.dumps(figures | {"images_per_s": rates}))


if __name__ == "__main__":
    main()
