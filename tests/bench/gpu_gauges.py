"""Measure what a call takes on the device: seconds, bytes of GPU memory, and FP8 products."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flux_ray.catalog.gpus import Gpu
from flux_ray.parallel.precision import is_quantized

Call = Callable[[], Any]
Seconds = dict[str, float]


@dataclass(frozen=True)
class Device:
    """The GPU, or this machine's CPU, for which all numbers of bytes are None."""

    kind: Literal["cuda", "cpu"]

    @property
    def name(self) -> str:
        """Return the name that the driver gives the GPU."""
        return torch.cuda.get_device_name() if self.kind == "cuda" else "processor"

    @property
    def card(self) -> Gpu | None:
        """Return the GPU as `flux-ray plan` describes it."""
        if self.kind == "cpu":
            return None
        has_fp8_units = torch.cuda.get_device_capability() >= (8, 9)
        total = torch.cuda.get_device_properties(0).total_memory
        return Gpu(self.name, total, has_fp8_units, has_nvlink=True)

    def wait(self) -> None:
        """Wait until all that was launched is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Free the memory that nothing refers to any more."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def held_bytes(self) -> int | None:
        """Return the bytes of all tensors on the GPU."""
        return torch.cuda.memory_allocated() if self.kind == "cuda" else None

    def total_bytes(self) -> int | None:
        """Return the usable bytes of the GPU."""
        return None if self.card is None else self.card.usable_bytes

    def peak(self, call: Call) -> tuple[Any, int | None]:
        """Return the call's result, and the most bytes that it had allocated at once."""
        if self.kind == "cpu":
            return call(), None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer = call()
        self.wait()
        return answer, torch.cuda.max_memory_allocated() - before

    def runtime_bytes(self) -> int | None:
        """Return the bytes in use beside PyTorch's: CUDA's context, and other programs if any."""
        if self.kind == "cpu":
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def seconds(self, call: Call, num_rounds: int) -> Seconds:
        """Return the seconds of several calls, after two calls to warm up."""
        taken_s = [self.seconds_of_one(call) for _ in range(2 + num_rounds)][2:]
        return {"median_s": statistics.median(taken_s), "best_s": min(taken_s)}

    def seconds_of_one(self, call: Call) -> float:
        """Return the seconds of one call, from an idle device to an idle device."""
        self.wait()
        began_s = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began_s


def fp8_products(call: Call, module: nn.Module) -> dict[str, Any]:
    """Count how many of the module's FP8 weights are multiplied with FP8 activations in a call.

    PyTorch's profiler tells. It is all of them if activations become FP8 too, and none if the
    weights are converted back first.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    num_products = sum(
        event.count for event in profile.key_averages() if event.key == "aten::_scaled_mm"
    )
    num_weights = sum(is_quantized(name) for name, _ in module.named_parameters())
    kinds = {0: "weight-only", num_weights: "FP8 activations"}
    return {
        "num_scaled_mm": num_products,
        "num_fp8_weights": num_weights,
        "kind": kinds.get(num_products, "partly FP8 activations"),
    }
