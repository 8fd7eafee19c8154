"""How long a running request still takes: by its price, then by the pace of its own steps."""

import time
from collections.abc import Callable

from flux_ray.request import Hear, News, Progress, RanksDone
from flux_ray.router.quote import Quote

# What takes less is over before the ledger would make anything of it, and listening costs a little.
# Its replica has the next request all the same: a price ends with the ranks' work, and the ledger
# hands over by it, while files are still made of the images.
FOLLOWED_S = 2.0
# News that come together say nothing of how fast the steps were.
MIN_MEASURED_S = 0.05


class RemainingTime:
    """Of one attempt, from its first step on: the price of what is left, at the pace so far."""

    def __init__(self, quote: Quote) -> None:
        self._request = request = quote.request
        self._step_s = quote.cost.denoise_s / request.num_denoise_steps
        num_decoded = request.num_images * (1 + len(request.preview_steps))
        self._decode_s = quote.cost.decode_s / num_decoded
        self._first: tuple[float, float] | None = None

    def left_s(self, progress: Progress, now: float) -> float:
        """Seconds until it is done."""
        priced_s = self._priced_s(progress.num_done)
        if self._first is None:
            self._first = priced_s, now
        at_first_s, began_at = self._first
        if now - began_at < MIN_MEASURED_S or priced_s >= at_first_s:
            return priced_s
        return priced_s * (now - began_at) / (at_first_s - priced_s)

    def _priced_s(self, num_done: int) -> float:
        """Of the steps that are left, and the pictures and previews that are not decoded."""
        request = self._request
        num_before, step = divmod(num_done - 1, request.num_steps)
        num_shown = sum(each < step + 1 for each in request.preview_steps)
        num_decoded = num_before * (1 + len(request.preview_steps)) + num_shown
        num_to_decode = request.num_images * (1 + len(request.preview_steps)) - num_decoded
        num_left = request.num_denoise_steps - num_done
        return num_left * self._step_s + num_to_decode * self._decode_s


def followed(quote: Quote, hear: Hear | None, tell: Callable[[float], None]) -> Hear | None:
    """`hear`, with `tell` told how long it still takes; None where nobody has to listen.

    Nothing is left of it once the ranks are done: that is for `tell` alone to hear.
    """
    if hear is None and quote.cost_s < FOLLOWED_S:
        return None
    pace = RemainingTime(quote)

    def follow(news: News) -> None:
        if isinstance(news, RanksDone):
            tell(0.0)
            return
        if isinstance(news, Progress):
            tell(pace.left_s(news, time.monotonic()))
        if hear is not None:
            hear(news)

    return follow
