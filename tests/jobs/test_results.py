"""The results store, in a folder and on an S3 server: whole or absent, bounded, our names only."""

import asyncio
import dataclasses
import uuid

import boto3
import pytest

from flux_ray.errors import ResultsLost
from flux_ray.jobs.images import ResultMissing, Results, ResultTooLarge, write_whole
from flux_ray.jobs.job import StoredImage
from flux_ray.request import GeneratedImage

JOB = str(uuid.UUID(int=1))
IMAGES = (GeneratedImage(b"first", 7), GeneratedImage(b"second", 8))


@pytest.fixture(params=["folder", "s3"])
def make_results(request, tmp_path):
    """`make_results()`: the same store each time, as another gateway has it."""
    if request.param == "folder":
        return lambda **rest: Results(str(tmp_path / "results"), **rest)
    s3 = request.getfixturevalue("s3")
    bucket = f"bucket-{uuid.uuid4().hex}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=bucket)
    client.close()
    return lambda **rest: Results(f"s3://{bucket}/results", s3.options, **rest)


async def test_images_come_back_for_any_gateway(make_results):
    stored = await make_results().write_images(JOB, 1, IMAGES, "png")
    assert [image.name for image in stored] == [f"{JOB}/1-0.png", f"{JOB}/1-1.png"]
    assert [(image.seed, image.num_bytes) for image in stored] == [(7, 5), (8, 6)]
    other = make_results()
    assert [await other.read_image(image) for image in stored] == [b"first", b"second"]


async def test_references_come_back(make_results):
    await make_results().write_references(JOB, (b"one", b"two"))
    assert await make_results().read_references(JOB, 2) == (b"one", b"two")
    with pytest.raises(ResultMissing):
        await make_results().read_references(JOB, 3)


async def test_references_are_removed_and_nothing_else(make_results):
    results = make_results()
    await results.write_references(JOB, (b"one", b"two"))
    [kept] = await results.write_images(JOB, 1, IMAGES[:1], "png")
    await results.remove_references(JOB, 2)
    for count in (1, 2):
        with pytest.raises(ResultMissing):
            await results.read_references(JOB, count)
    assert await results.read_image(kept) == b"first"
    await results.remove_references(JOB, 2)


async def test_previews_are_removed_and_nothing_else(make_results):
    results = make_results()
    previews = [await results.write_preview(JOB, 1, n, IMAGES[n], "png") for n in range(2)]
    [kept] = await results.write_images(JOB, 1, IMAGES[:1], "png")
    assert [await results.read_image(each) for each in previews] == [b"first", b"second"]
    await results.remove_previews(JOB, 1, 3, "png")
    for preview in previews:
        with pytest.raises(ResultMissing):
            await results.read_image(preview)
    assert await results.read_image(kept) == b"first"


async def test_attempts_do_not_meet(make_results):
    results = make_results()
    [first] = await results.write_images(JOB, 1, IMAGES[:1], "png")
    [second] = await results.write_images(JOB, 2, IMAGES[1:], "png")
    assert await results.read_image(first) == b"first"
    assert await results.read_image(second) == b"second"


async def test_a_job_is_removed_with_all_it_has(make_results):
    results = make_results()
    other = str(uuid.UUID(int=2))
    await results.write_references(JOB, (b"one",))
    [gone] = await results.write_images(JOB, 1, IMAGES[:1], "png")
    [kept] = await results.write_images(other, 1, IMAGES[:1], "png")
    await make_results().remove_job(JOB)
    with pytest.raises(ResultMissing):
        await results.read_image(gone)
    with pytest.raises(ResultMissing):
        await results.read_references(JOB, 1)
    assert await results.read_image(kept) == b"first"
    await results.remove_job(JOB)


async def test_sizes_are_bounded(make_results):
    [stored] = await make_results().write_images(JOB, 1, IMAGES[1:], "png")
    narrow = make_results(max_bytes=5)
    with pytest.raises(ResultTooLarge):
        await narrow.write_images(JOB, 2, IMAGES[1:], "png")
    with pytest.raises(ResultTooLarge):
        await narrow.read_image(stored)
    assert len(await narrow.write_images(JOB, 2, IMAGES[:1], "png")) == 1


async def test_a_damaged_image_is_missing(make_results):
    results = make_results()
    [stored] = await results.write_images(JOB, 1, IMAGES[:1], "png")
    with pytest.raises(ResultMissing):
        await results.read_image(dataclasses.replace(stored, sha256="0" * 64))


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        f"{JOB}/../../secret",
        f"{JOB}/1-0.png/../../../secret",
        f"/{JOB}/1-0.png",
        f"{JOB}/1-0.svg",
        f"{JOB}/1-0.png\n",
        f"{JOB}/٣-0.png",
        f"{JOB.upper()[:-1]}A/1-0.png",
        "",
    ],
)
async def test_only_our_names_are_looked_for(tmp_path, folder, name):
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(ResultMissing, match="no name of ours"):
        await folder.read_image(StoredImage(name, 1, 6, ""))


@pytest.mark.parametrize("job_id", ["", ".", "..", "*", f"{JOB}/..", f"{JOB}\n"])
async def test_only_a_jobs_folder_is_removed(tmp_path, folder, job_id):
    await folder.write_references(JOB, (b"one",))
    with pytest.raises(ResultMissing):
        await folder.remove_job(job_id)
    assert await folder.read_references(JOB, 1) == (b"one",)


def test_a_disk_that_refuses_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "job" / "1-0.png"
    write_whole(path, b"before")

    def refuse(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_reader_sees_all_or_nothing_of_what_is_written_again(folder):
    data = bytes(5_000_000)

    async def write() -> None:
        for _ in range(10):
            await folder.write_references(JOB, (data,))

    writing = asyncio.create_task(write())
    num_read = 0
    while not writing.done():
        try:
            [read] = await folder.read_references(JOB, 1)
        except ResultMissing:
            continue
        assert len(read) == len(data)
        num_read += 1
    await writing
    assert num_read > 0


async def test_a_store_that_is_away_is_lost(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(ResultsLost):
        await Results(str(tmp_path / "results")).write_references(JOB, (b"one",))
    away = {"endpoint_url": "http://127.0.0.1:9", "key": "test", "secret": "test"}
    quick = {"retries": 1, "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(ResultsLost):
        await Results("s3://bucket", away | quick).write_references(JOB, (b"one",))


async def test_a_bucket_that_is_not_there_is_a_lost_store(s3):
    with pytest.raises(ResultsLost):
        await Results("s3://no-such-bucket/results", s3.options).write_references(JOB, (b"one",))
