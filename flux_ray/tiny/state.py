"""What all training stages share: learning rate, optimiser step, log, and resuming after a stop."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

SAVE_EVERY_S = 120.0


class Run:
    """A training run in a folder, with finished stages (`vae.pt`) and others (`vae.resume.pt`).

    Each stage calls `resume` once, then for every step `set_rate`, `descend` and `report`, and at
    the end `finish`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.saved_s = time.monotonic()
        self.losses: list[float] = []

    def resume(
        self,
        stage: str,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        extra: torch.nn.Module | None = None,
    ) -> int:
        """Load the state of an interrupted stage, and return the step to go on with; 0 if none."""
        path = self.folder / f"{stage}.resume.pt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        if extra is not None:
            extra.load_state_dict(state["extra"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])

    def set_rate(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        peak: float,
        step: int,
        steps: int,
        *,
        warm_up: int,
        decay: float,
    ) -> None:
        """Set the learning rate of a step: linear warm-up, flat, then linear down to zero.

        `warm_up` is in steps; `decay` is the fraction of all steps over which the rate falls.
        """
        rate = peak * min(1.0, (step + 1) / warm_up) * min(1.0, (steps - step) / (decay * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def descend(
        self,
        loss: torch.Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Iterable[torch.nn.Parameter],
        *,
        num_ranks: int = 1,
    ) -> None:
        """Make one optimiser step, with the gradient averaged over the ranks, clipped to norm 1."""
        parameters = list(parameters)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if num_ranks > 1:
            average_gradients(parameters, num_ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def report(
        self,
        stage: str,
        step: int,
        steps: int,
        loss: float,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        extra: torch.nn.Module | None = None,
    ) -> None:
        """Print the mean loss every 100 steps, and save the state every two minutes."""
        self.losses.append(loss)
        if (step + 1) % 100 == 0:
            mean = sum(self.losses) / len(self.losses)
            print(f"{stage} {step + 1}/{steps} loss {mean:.4f}", flush=True)
            self.losses.clear()
        if time.monotonic() - self.saved_s < SAVE_EVERY_S:
            return
        self.saved_s = time.monotonic()
        state = {
            "step": step + 1,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "extra": None if extra is None else extra.state_dict(),
        }
        # A process that is killed while it writes leaves the last whole file in place.
        torch.save(state, self.folder / f"{stage}.part")
        (self.folder / f"{stage}.part").rename(self.folder / f"{stage}.resume.pt")

    def finish(self, stage: str, model: torch.nn.Module) -> None:
        """Save the stage's weights and delete its resume file: if run again, it starts anew."""
        torch.save(model.state_dict(), self.folder / f"{stage}.pt")
        (self.folder / f"{stage}.resume.pt").unlink(missing_ok=True)


def average_gradients(parameters: Sequence[torch.nn.Parameter], num_ranks: int) -> None:
    """Average all gradients over the ranks in place, with a single all-reduce."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= num_ranks
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
