"""What fuzzing shares: bytes near to good ones, and the time that no input may take."""

import struct
import time
import zlib
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Of the processor: what a bad input may take of all threads together.
MAX_SECONDS = 1.0
NUM_TRIES = 3
NUM_EXAMPLES = 200
# Of a fixture each example finds the same: what it did before does not matter.
FUZZ = settings(
    settings.get_profile("change"),
    max_examples=NUM_EXAMPLES,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
# Lengths, counts and marks of the formats: the least, the most, and what stands at their borders.
ODD = (b"\0", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\xff\xff\xff\xff")


def within_budget() -> Iterator[None]:
    """Do what stands below once, and again if it took too long; fail if it did each time.

    A slow input is slow every time. What is slow once is a first use or the garbage of other tests.
    A wait for others costs nothing.
    """
    for _ in range(NUM_TRIES):
        started_s = time.process_time()
        yield
        seconds = time.process_time() - started_s
        if seconds < MAX_SECONDS:
            return
    pytest.fail(f"took {seconds:.1f} s of the processor")


@st.composite
def mutated(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of the files after some changes, each of another kind."""
    data = bytearray(draw(st.sampled_from(files)))
    for kind in draw(st.lists(st.sampled_from(KINDS), max_size=6)):
        at = draw(st.integers(0, len(data)))
        kind(draw, data, at, files)
    return bytes(data)


def flip(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Change bits of one byte."""
    if at < len(data):
        data[at] ^= draw(st.integers(1, 255))


def truncate(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Leave out the rest."""
    del data[at:]


def leave_out(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Leave out a piece."""
    del data[at : at + draw(st.integers(1, 64))]


def repeat(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Have a piece several times."""
    piece = bytes(data[at : at + draw(st.integers(1, 64))])
    data[at:at] = piece * draw(st.sampled_from([1, 3, 100]))


def insert(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Put something between."""
    data[at:at] = draw(st.one_of(st.binary(max_size=32), st.sampled_from(ODD)))


def overwrite(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Write an odd number over what is there."""
    odd = draw(st.sampled_from(ODD))
    data[at : at + len(odd)] = odd


def splice(draw: st.DrawFn, data: bytearray, at: int, files: Sequence[bytes]) -> None:
    """Put a piece of another file between."""
    other = draw(st.sampled_from(files))
    start = draw(st.integers(0, len(other)))
    data[at:at] = other[start : start + draw(st.integers(1, 2000))]


KINDS = (flip, truncate, leave_out, repeat, insert, overwrite, splice)


def mended(png: bytes) -> bytes:
    """The PNG with the right checksum at each chunk, so that more of it is read."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)
