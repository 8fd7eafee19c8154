"""Image files, made on threads of the leader's own while the ranks go on with the next request."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flux_ray.engine.images import encode_picture
from flux_ray.request import DenoisedImage, Encoding, GeneratedImage, RgbImage

# One keeps up with any card; the second is for a file that takes long, such as a large webp.
NUM_THREADS = 2
# Images of which no file is made yet. Beyond them the ranks wait: pixels are many bytes.
MAX_WAITING = 8

Encode = Callable[[RgbImage, Encoding], bytes]
# And the seconds that its thread took.
Made = tuple[GeneratedImage, float]


class Files:
    """Makes files in about the order in which they are asked for. Pillow and ISA-L free the GIL."""

    def __init__(self, encode: Encode = encode_picture) -> None:
        self._encode = encode
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="files")
        self._room = asyncio.Semaphore(MAX_WAITING)

    async def start(self, image: DenoisedImage, encoding: Encoding) -> "asyncio.Future[Made]":
        """Begin with the image's file, once there is room for it; cancel what is not wanted."""
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        file = loop.run_in_executor(self._threads, self._make, image, encoding)
        file.add_done_callback(lambda _: self._room.release())
        return file

    def _make(self, image: DenoisedImage, encoding: Encoding) -> Made:
        began = time.perf_counter()
        data = self._encode(image.raster, encoding)
        return GeneratedImage(data, image.seed), time.perf_counter() - began
