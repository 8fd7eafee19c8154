"""Releases side by side: what one cannot read is left to the other, and costs nothing."""

import pytest
from sqlalchemy import text

from flux_ray.jobs.attempt import RetryLater, WorkerContext, outcome_of
from flux_ray.jobs.serialization import Unreadable, check_readable, pack
from flux_ray.jobs.service import accept
from flux_ray.jobs.statements import Wanted
from flux_ray.jobs.store import Store
from flux_ray.jobs.worker import Worker
from flux_ray.request import PROTOCOL, Encoding, ImageRequest, Mask, RgbImage
from tests.jobs.conftest import KEEP_S, LEASE_S
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until

RED = RgbImage(3, 2, b"\xff\x00\x00" * 6)
REQUEST = ImageRequest(
    "r", "tiny", "a red circle", 64, 48, 4, 1.5, 2**64 - 1, 2, (RED,), Encoding("webp", 80), None
)


def row_with(name: str, value: object, inside: str | None = None) -> dict:
    row = pack(REQUEST).row
    return row | {name: value} if inside is None else row | {inside: row[inside] | {name: value}}


def test_what_this_release_packs_it_reads():
    check_readable(pack(REQUEST).row)
    masked = ImageRequest(
        "r", "t", "", 3, 2, 1, 1, 1, 1, (RED,), mask=Mask(3, 2, bytes(6)), num_previews=2
    )
    check_readable(pack(masked).row)


def test_what_an_older_release_packed_is_read():
    row = pack(REQUEST).row
    for name in ("mask", "num_previews", "references"):
        check_readable({key: value for key, value in row.items() if key != name})
    encoding = {"format": "png", "quality": 95}
    check_readable(row | {"encoding": encoding})


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (row_with("loras", []), "loras"),
        (row_with("subsampling", "4:4:4", inside="encoding"), "encoding.subsampling"),
        (row_with("format", "avif", inside="encoding"), "encoding.format"),
        (row_with("num_steps", "auto"), "num_steps"),
        (row_with("num_steps", "4"), "num_steps"),
        (row_with("references", [{"blob": 0, "width": 3, "height": 2, "kind": "depth"}]), "kind"),
        (row_with("references", [{"blob": 0, "width": 3, "height": 2, "weight": 0.5}]), "weight"),
    ],
)
def test_what_a_newer_release_packed_is_not_read_as_something_else(row, named):
    with pytest.raises(Unreadable, match=named):
        check_readable(row)


def test_a_reason_does_not_quote_the_caller():
    with pytest.raises(Unreadable) as caught:
        check_readable(row_with("prompt", {"secret words": 1}))
    assert "secret" not in str(caught.value)


def test_a_job_that_cannot_be_read_is_never_lost():
    for num_lost in range(5):
        outcome = outcome_of(Unreadable("a newer flux-ray packed this request"), num_lost)
        assert isinstance(outcome, RetryLater) and not outcome.is_lost


async def test_a_job_of_a_newer_release_is_not_claimed(database, store, folder, offer, clock):
    newer = Store(database, LEASE_S, KEEP_S, clock, protocol=PROTOCOL + 1)
    old, new = await accept(store, folder, offer(1)), await accept(newer, folder, offer(2))
    assert (await store.claim("old")).job_id == old.job_id
    assert await store.claim("old") is None
    assert (await newer.claim("new")).job_id == new.job_id
    await accept(store, folder, offer(3))
    assert (await newer.claim("new")).job.seed == 3


async def test_a_lost_job_of_a_newer_release_is_not_claimed(database, store, offer, clock, pass_s):
    newer = Store(database, LEASE_S, KEEP_S, clock, protocol=PROTOCOL + 1)
    await newer.accept(offer(), pack(offer().request).row, is_whole=True)
    await newer.claim("new")
    await pass_s(2 * LEASE_S)
    assert await store.claim("old") is None


async def test_a_job_without_a_protocol_is_claimed(database, store, folder, offer):
    job = await accept(store, folder, offer())
    async with database.connect() as connection:
        await connection.execute(text("UPDATE flux_jobs SET protocol = NULL"))
    assert (await store.claim("w")).job_id == job.job_id


async def accept_unreadable(store, offer):
    """Somebody forgot to raise the protocol's number."""
    row = pack(offer.request).row | {"loras": ["a"]}
    return await store.accept(offer, row, is_whole=True)


async def test_a_job_that_cannot_be_read_is_put_back_uncounted_once(
    store, folder, offer, clock, serve_log
):
    job = await accept_unreadable(store, offer(1))
    clock.now_s += 1
    worker = Worker(WorkerContext(store, folder, paint), 4, poll_s=0.01)
    worker.start()
    for seed in range(2, 6):
        # Claimed after it: by then it is back.
        readable = await accept(store, folder, offer(seed))
        worker.wake()
        await wait_until(is_ready(store, readable))
    await worker.stop()
    found = await store.find("anna", job.job_id)
    assert (found.status, found.num_lost, found.attempt) == ("pending", 0, 1)
    told = [line for line in serve_log.messages if job.job_id in line]
    assert len(told) == 1 and "loras" in told[0]
    # It has kept its place for whoever can read it.
    await accept(store, folder, offer(6))
    assert (await store.claim("newer")).job_id == job.job_id


def is_ready(store, job):
    async def look() -> bool:
        return (await store.find("anna", job.job_id)).status == "ready"

    return look


async def test_a_worker_takes_no_job_of_a_tier_that_its_gateway_does_not_serve(
    store, folder, offer
):
    job = await accept(store, folder, offer())
    assert await store.claim("w", Wanted(tiers=frozenset({"other"}))) is None
    worker = Worker(WorkerContext(store, folder, paint), 4, poll_s=0.01, tiers=("tiny",))
    worker.start()

    await wait_until(is_ready(store, job))
    await worker.stop()
