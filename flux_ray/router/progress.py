"""How far each request of this process has come, for whoever asks by its id."""

from collections.abc import Awaitable, Callable

from flux_ray.request import Hear, ImageRequest, ImageResult, News, Progress

Draw = Callable[[ImageRequest, Hear], Awaitable[ImageResult]]


class Followed:
    """Has requests drawn, and listens meanwhile."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._latest: dict[str, Progress] = {}

    async def generate(self, request: ImageRequest) -> ImageResult:
        """The pictures; its errors are those of `draw`."""

        def hear(news: News) -> None:
            if isinstance(news, Progress):
                self._latest[request.request_id] = news

        try:
            return await self._draw(request, hear)
        finally:
            self._latest.pop(request.request_id, None)

    def progress_of(self, request_id: str) -> float | None:
        """From 0 to 1; None before its first step, and of requests that are not drawn here.

        It begins anew where a second replica draws what the first did not live to finish.
        """
        latest = self._latest.get(request_id)
        return None if latest is None else latest.share
