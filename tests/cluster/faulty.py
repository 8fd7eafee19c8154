"""A tier whose last rank fails on demand: a prompt that is the path of a file names the failure."""

import sys
from pathlib import Path

from ray.serve import Application

from flux_ray.app import tier_application
from flux_ray.config import TierArgs
from flux_ray.replica.leader import Leader
from flux_ray.replica.rank import RankActor, in_lockstep

BUG, OUT_OF_MEMORY = "bug", "out of memory"


# diffusers loads what it finds, for seconds; where flux-ray is installed without its tests, or for
# other than small cards, these are not there.
OF_TESTS = ("peft", "bitsandbytes")


class FaultyRank(RankActor):
    """Fails once: the file is gone when the request is drawn again."""

    def __init__(self, rank: int, args: TierArgs) -> None:
        sys.modules |= dict.fromkeys(OF_TESTS)
        super().__init__(rank, args)

    @in_lockstep
    def denoise(self, job: int) -> None:
        """One step, unless a file says otherwise."""
        order = Path(self._drawings[job].request.prompt)
        if self._rank == self._args.parallel.num_ranks - 1 and order.is_file():
            failure = order.read_text()
            order.unlink()
            raise error_for(failure)
        super().denoise(job)


def error_for(failure: str) -> Exception:
    """As torch or a mistake of ours would raise it."""
    from torch import OutOfMemoryError

    return OutOfMemoryError("CUDA has 3 MB") if failure == OUT_OF_MEMORY else KeyError(failure)


class FaultyLeader(Leader):
    """A leader of such ranks."""

    rank_class = FaultyRank


def build_tier(args: TierArgs) -> Application:
    """In place of flux_ray.app:build_tier."""
    return tier_application(args, FaultyLeader)
