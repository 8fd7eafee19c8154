"""How long a running request still takes: by its price, then by the pace of its own steps."""

import time
from collections.abc import Callable

from flux_ray.request import Hear, News, Progress
from flux_ray.router.quote import Quote

# What takes less is over before the ledger would make anything of it, and listening costs a little.
FOLLOWED_S = 2.0


class Pace:
    """Of one attempt, from its first step on."""

    def __init__(self, quote: Quote) -> None:
        request, cost = quote.request, quote.cost
        self._step_s = cost.denoise_s / request.num_denoise_steps
        num_decoded = request.num_images * (1 + len(request.preview_steps))
        # What comes between steps is in their pace; this is what comes after the last.
        self._tail_s = cost.decode_s / num_decoded
        self._first: tuple[int, float] | None = None

    def left_s(self, progress: Progress, now: float) -> float:
        """Seconds until it is done."""
        if self._first is None:
            self._first = progress.num_done, now
        num_before, began_at = self._first
        if progress.num_done > num_before:
            self._step_s = (now - began_at) / (progress.num_done - num_before)
        return (progress.num_steps - progress.num_done) * self._step_s + self._tail_s


def followed(quote: Quote, hear: Hear | None, tell: Callable[[float], None]) -> Hear | None:
    """`hear`, with `tell` told how long it still takes; None where nobody has to listen."""
    if hear is None and quote.cost_s < FOLLOWED_S:
        return None
    pace = Pace(quote)

    def follow(news: News) -> None:
        if isinstance(news, Progress):
            tell(pace.left_s(news, time.monotonic()))
        if hear is not None:
            hear(news)

    return follow
