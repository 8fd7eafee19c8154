"""What stands for Ray in a gateway of its own process: turns, so many at a time, and replicas."""

import asyncio
import io
import pickle

from PIL import Image

from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, OnEvent, StageTimes
from flux_ray.router.ledger.messages import SubmitRequest
from flux_ray.router.queue.admission import Forecast

GENERATE_S = 0.02


def small_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG")
    return file.getvalue()


class FakeTurns:
    """Grants so many turns at a time, in order of arrival."""

    def __init__(self, num_slots: int) -> None:
        self._slots = asyncio.Semaphore(num_slots)

    async def take(
        self, offer: SubmitRequest, on_event: object = None, quota: object = None
    ) -> str:
        await self._slots.acquire()
        return "replica"

    async def forecast(self, offers: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        return tuple(Forecast(0.0) for _ in offers)

    def progress(self, ticket_id: str, left_s: float) -> None:
        pass

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        self._slots.release()


class FakeHandles:
    """Replicas that answer after a moment; what travels to them is made, as it would be."""

    def __init__(self) -> None:
        self.image = small_image()

    async def connect(self, tier: str) -> None:
        pass

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None
    ) -> ImageResult:
        travelled = pickle.loads(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))
        assert all(each.rgb for each in travelled.references)
        await asyncio.sleep(GENERATE_S)
        images = tuple(GeneratedImage(self.image, seed) for seed in request.seeds)
        times = StageTimes(0.0, 0.001, GENERATE_S, 0.001)
        return ImageResult(request.request_id, request.tier, images, times)

    async def ready_tiers(self) -> tuple[str, ...]:
        return ("flux-2-dev",)
