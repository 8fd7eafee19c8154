"""A deferred request is loaded when its replica is granted; nobody needs its pixels before."""

import pytest

from flux_ray.errors import ReplicaFailed, ResultsLost
from flux_ray.request import DeferredRequest, ImageRequest, RgbImage, outline_of

WHOLE = ImageRequest(
    "id", "tiny", "a ring", 128, 128, 4, 1.0, 7, references=(RgbImage(64, 64, bytes(64 * 64 * 3)),)
)


@pytest.fixture
def deferred(turns):
    """`deferred(error)`: a request that notes how many turns were taken when it was loaded."""

    def make(error: Exception | None = None) -> DeferredRequest:
        async def load() -> ImageRequest:
            make.loaded_after.append(len(turns.submissions))
            if error is not None:
                raise error
            return WHOLE

        reference = WHOLE.references[0]
        outline = outline_of(RgbImage(reference.width, reference.height, b""), reference.digest)
        values = {name: getattr(WHOLE, name) for name in ImageRequest.__dataclass_fields__}
        return DeferredRequest(**values | {"references": (outline,)}, load=load)

    make.loaded_after = []
    return make


async def test_it_is_loaded_after_its_turn_came(router, handles, turns, deferred):
    await router.generate(deferred())
    assert deferred.loaded_after == [1]
    assert handles.requests == [WHOLE]
    assert turns.submissions[0].affinity[1][0] == WHOLE.references_name


async def test_it_is_loaded_again_for_a_second_replica(router, handles, deferred):
    handles.failures = [ReplicaFailed("died")]
    await router.generate(deferred())
    assert deferred.loaded_after == [1, 2]
    assert handles.requests == [WHOLE, WHOLE]


async def test_what_cannot_be_loaded_gives_its_turn_back(router, handles, turns, bill, deferred):
    with pytest.raises(ResultsLost):
        await router.generate(deferred(ResultsLost("away")))
    assert turns.ended == [turns.submissions[0].ticket_id]
    assert (turns.done, handles.requests, bill.entries) == ([], [], [])
