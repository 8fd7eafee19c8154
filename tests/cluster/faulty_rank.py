"""A rank that fails on demand: if the prompt is the path of a file, the file names the failure.

This module imports neither the leader nor the gateway, so that the rank starts as fast as a real
one.
"""

from pathlib import Path

from flux_ray.replica.rank import RankActor

BUG, OUT_OF_MEMORY = "bug", "out of memory"


class FaultyRank(RankActor):
    """A rank that fails once for each file: it removes the file before it raises."""

    def denoise(self, job: int) -> None:
        """Run a step, or raise the error that the file of the prompt names, on the last rank."""
        order = Path(self._jobs[job].request.prompt)
        if self._rank == self._args.parallel.num_ranks - 1 and order.is_file():
            failure = order.read_text()
            order.unlink()
            raise error_for(failure)
        super().denoise(job)


def error_for(failure: str) -> Exception:
    """Return the error as torch would raise it, or a bug of ours."""
    from torch import OutOfMemoryError

    return OutOfMemoryError("CUDA has 3 MB") if failure == OUT_OF_MEMORY else KeyError(failure)
