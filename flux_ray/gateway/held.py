"""How many bytes of decoded pictures this process holds, and that it is not too many."""

import threading
import weakref

from flux_ray.errors import Overloaded
from flux_ray.request import Raster

AGAIN_S = 2


class Held:
    """A picture counts until nobody holds it any more: small files are large when decoded."""

    def __init__(self) -> None:
        self.num_bytes = 0
        # Pictures are decoded on threads, and end on any.
        self._lock = threading.RLock()

    def add(self, raster: Raster, max_bytes: int) -> None:
        """Count it; Overloaded if there is no room."""
        size = len(raster.rgb)
        with self._lock:
            if self.num_bytes + size > max_bytes:
                message = "this gateway has as many pictures in hand as it may"
                raise Overloaded(message, None, AGAIN_S)
            self.num_bytes += size
        weakref.finalize(raster, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        with self._lock:
            self.num_bytes -= size


HELD = Held()
