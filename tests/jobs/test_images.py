"""Images by name, and the secret that all gateways share."""

import asyncio
import dataclasses
import os
import uuid

import pytest

from flux_ray.errors import ResultsLost
from flux_ray.jobs.cleanup import clean_up
from flux_ray.jobs.database import Database, shared_secret
from flux_ray.jobs.images import KEPT_FOR, ImageStore, ResultMissing
from flux_ray.jobs.job import JobResult
from flux_ray.jobs.serialization import pack
from flux_ray.jobs.statements import ARRIVAL_S
from flux_ray.request import GeneratedImage
from tests.jobs.conftest import KEEP_S, LEASE_S
from tests.jobs.painter import paint

IMAGE = (GeneratedImage(b"an image", 7),)


@pytest.fixture
def shelf(database, folder) -> ImageStore:
    return ImageStore(database, folder, KEEP_S)


@pytest.fixture
def generate(store, folder, offer):
    """`draw()`: the lease of a job, and its image in the folder."""

    async def generate():
        await store.accept(offer(), pack(offer().request).row, True)
        lease = await store.claim("w")
        [image] = await folder.write_images(lease.job_id, lease.attempt, IMAGE, "png")
        return lease, image

    return generate


async def test_a_ready_jobs_image_is_found_by_name(shelf, store, generate, clock):
    lease, image = await generate()
    with pytest.raises(ResultMissing):
        await shelf.read(image.name)
    assert await store.finish(lease, JobResult((image,), {}))
    assert await shelf.read(image.name) == b"an image"
    clock.now_s += KEEP_S
    with pytest.raises(ResultMissing):
        await shelf.read(image.name)


async def test_images_of_lost_attempts_are_not_there(shelf, store, generate, folder, pass_s):
    lost, old = await generate()
    await pass_s(LEASE_S + 1)
    lease = await store.claim("another")
    [image] = await folder.write_images(lease.job_id, lease.attempt, IMAGE, "png")
    assert await store.finish(lease, JobResult((image,), {}))
    assert lost.job_id == lease.job_id
    with pytest.raises(ResultMissing):
        await shelf.read(old.name)
    assert await shelf.read(image.name) == b"an image"


async def test_what_was_changed_on_the_disk_is_not_shown(shelf, store, generate):
    lease, image = await generate()
    changed = dataclasses.replace(image, sha256="0" * 64)
    assert await store.finish(lease, JobResult((changed,), {}))
    with pytest.raises(ResultMissing):
        await shelf.read(image.name)


@pytest.mark.parametrize("file", ["reference-0", "1-0.jpeg", "../1-0.png", "", "1-0.png/"])
async def test_other_names_are_unknown(shelf, store, generate, folder, file):
    lease, image = await generate()
    await folder.write_references(lease.job_id, (b"somebody's own image",))
    assert await store.finish(lease, JobResult((image,), {}))
    for job_id in (lease.job_id, str(uuid.uuid4()), "%", "..", ""):
        with pytest.raises(ResultMissing):
            await shelf.read(f"{job_id}/{file}")


async def test_what_was_generated_without_a_job_is_kept_as_long(shelf, store, folder, offer, clock):
    request = offer().request
    result = await paint(None, request)
    [image] = await shelf.keep("anna", request, result)
    assert await shelf.read(image.name) == result.images[0].data
    job_id = image.name.partition("/")[0]
    assert await store.find("anna", job_id) is None
    job = await store.find(KEPT_FOR + "anna", job_id)
    assert (job.status, job.result.images, job.packed) == ("ready", (image,), {})
    assert await store.num_active("anna") == 0
    assert await store.claim("w") is None
    clock.now_s += KEEP_S - 1
    assert await clean_up(store, folder) == 0
    clock.now_s += 1
    assert await clean_up(store, folder) == 1
    with pytest.raises(ResultMissing):
        await folder.read_image(image)


async def test_what_was_kept_in_part_is_removed_too(shelf, store, folder, offer, clock):
    async def full(*args):
        await write(*args)
        raise ResultsLost("the disk is full")

    write, folder.write_images = folder.write_images, full
    request = offer().request
    with pytest.raises(ResultsLost):
        await shelf.keep("anna", request, await paint(None, request))
    [job_id] = os.listdir(folder._root)
    assert await store.find("anna", job_id) is None
    clock.now_s += ARRIVAL_S
    assert await clean_up(store, folder) == 1
    assert os.listdir(folder._root) == []


async def test_the_secret_is_one_for_all(database_url):
    first, second = Database(database_url), Database(database_url)
    await first.create()
    made = await asyncio.gather(*(shared_secret(each, "a") for each in (first, second) * 8))
    assert len(set(made)) == 1 and len(made[0]) == 32
    assert await shared_secret(first, "b") != made[0]
    await first.close()
    await second.close()
