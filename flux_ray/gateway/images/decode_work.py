"""The work that one image may cost: a decoder that asks for more of its file is stopped.

Threads cannot be stopped from outside. But decoders ask for their file piece by piece, and what is
raised there ends them.
"""

import io
import time

from PIL import Image

from flux_ray.errors import BadReference

FORMATS = ("PNG", "JPEG", "WEBP")


class DecodeWork:
    """Processor seconds of this thread, from now on, for one image however often it is decoded."""

    def __init__(self, max_s: float, name: str) -> None:
        self._until_s = time.thread_time() + max_s
        self._name = name

    def open(self, data: bytes) -> Image.Image:
        """Open the file, to be decoded within the limit. Raises what Pillow raises."""
        return Image.open(WatchedFile(data, self), formats=FORMATS)

    def check(self) -> None:
        """Raise BadReference if it took longer than it may."""
        if time.thread_time() > self._until_s:
            raise self.exceeded()

    def exceeded(self) -> BadReference:
        """Return the error for an image that takes, or would take, more than it may."""
        return BadReference(
            f"{self._name} takes too long to decode: save it as a plain (baseline) JPEG or PNG",
            "image",
        )


class WatchedFile(io.BytesIO):
    """A file that is not read any further once its image took too long."""

    def __init__(self, data: bytes, work: DecodeWork) -> None:
        super().__init__(data)
        self._work = work

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file. Raises BadReference."""
        self._work.check()
        return super().read(size)
