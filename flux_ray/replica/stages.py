"""The stages that draw a request, and which of them the ranks are sent in one call. Pure."""

from collections.abc import Callable, Iterable, Iterator

from flux_ray.request import ImageRequest

# What people take for at once: so late may a preview come, and so long may ranks work on for a
# client that has left. In a fifth of a millisecond a call they do not, and it costs processors.
SHORT_S = 0.1


def stages_of(request: ImageRequest) -> Iterator[str]:
    """The stages that draw a request, in order. The last one of them ends it on the ranks."""
    yield "encode"
    for _ in request.seeds:
        yield "prepare"
        for number in range(1, request.num_steps + 1):
            yield "denoise"
            if number in request.preview_steps:
                yield "preview"
        yield "decode"


def calls_of(
    stages: Iterable[str], expected_s: Callable[[str], float]
) -> Iterator[tuple[str, ...]]:
    """The stages, as many in a call as take SHORT_S together, at least one.

    Between any two calls the request may be dropped. What a stage takes is asked as late as can be:
    one that was never seen is infinite, and so goes alone.
    """
    call: list[str] = []
    left_s = SHORT_S
    for stage in stages:
        seconds = expected_s(stage)
        if call and seconds > left_s:
            yield tuple(call)
            call, left_s = [], SHORT_S
        call.append(stage)
        left_s -= seconds
    yield tuple(call)


def sizes_of(request: ImageRequest) -> tuple[int, int]:
    """What makes a request's stages long: the pixels of its canvas and of its references."""
    references = sum(raster.width * raster.height for raster in request.references)
    return request.width * request.height, references
