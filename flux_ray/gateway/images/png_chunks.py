"""PNG files of many chunks: Pillow takes each in a loop of Python, though it is empty."""

from flux_ray.gateway.images.decode_work import DecodeWork

PNG_START = b"\x89PNG\r\n\x1a\n"
# One a row of the longest image that is read, and as many again.
MAX_CHUNKS = 20_000


def check_chunks(data: bytes, work: DecodeWork) -> None:
    """Raise BadReference if the file has more chunks than any real one."""
    at, num_chunks = len(PNG_START), 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        num_chunks += 1
        if num_chunks > MAX_CHUNKS:
            raise work.exceeded()
