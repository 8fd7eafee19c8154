"""What the step loops of all flow-matching families share.

A flow leads from noise at sigma 1 to an image at sigma 0; the transformer predicts its velocity.
Everything here equals what diffusers' scheduler and pipelines compute, bit for bit.
"""

from dataclasses import replace
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, float32

from flux_ray.engine.api import ImageState

# The scheduler's timesteps end here, and the transformer takes them from 0 to 1.
FULL_TIMESTEP = 1000


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless the checkpoint's scheduler makes Euler steps without added noise.

    `step_along` makes no other steps, and would generate wrong images without any error.
    """
    if (
        not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or scheduler.config.stochastic_sampling
    ):
        raise ValueError(f"the scheduler {type(scheduler).__name__} makes no plain Euler steps")


def transformer_timestep(state: ImageState) -> Tensor:
    """Return the timestep of the next step as the transformer takes it, [1] from 0 to 1.

    It has the latents' dtype before it is divided, as in the pipelines: in bf16 this matters.
    """
    return state.timesteps[state.step].expand(1).to(state.latents.dtype) / FULL_TIMESTEP


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Return the velocity of classifier-free guidance: away from `negative` by `scale`."""
    return negative + scale * (positive - negative)


def step_along(state: ImageState, velocity: Tensor) -> ImageState:
    """Return the state after one Euler step along `velocity`, [1, tokens, channels]."""
    dt = state.sigmas[state.step + 1] - state.sigmas[state.step]
    # In fp32, as in diffusers' scheduler: in bf16, small differences would be rounded away.
    latents = (state.latents.to(float32) + dt * velocity).to(velocity.dtype)
    kept = velocity if state.canvas.has_previews else None
    return replace(state, latents=latents, step=state.step + 1, velocity=kept)


def straight_end(state: ImageState) -> ImageState:
    """Return the state with the latents at which the last step's velocity would end.

    The paths of a flow are nearly straight, so a single long step comes close to the end.
    """
    assert state.velocity is not None, "a preview that the canvas does not speak of"
    latents = state.latents.to(float32) - state.sigmas[state.step] * state.velocity
    return replace(state, latents=latents.to(state.latents.dtype))
