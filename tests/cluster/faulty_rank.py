"""A rank that fails on demand: a prompt that is the path of a file names the failure.

Neither the leader nor the gateway is imported here, for it starts as fast as one of ours.
"""

from pathlib import Path

from flux_ray.replica.rank import RankActor

BUG, OUT_OF_MEMORY = "bug", "out of memory"


class FaultyRank(RankActor):
    """Fails once: the file is gone when the request is drawn again."""

    def denoise(self, job: int) -> None:
        """One step, unless a file says otherwise."""
        order = Path(self._generations[job].request.prompt)
        if self._rank == self._args.parallel.num_ranks - 1 and order.is_file():
            failure = order.read_text()
            order.unlink()
            raise error_for(failure)
        super().denoise(job)


def error_for(failure: str) -> Exception:
    """As torch or a mistake of ours would raise it."""
    from torch import OutOfMemoryError

    return OutOfMemoryError("CUDA has 3 MB") if failure == OUT_OF_MEMORY else KeyError(failure)
