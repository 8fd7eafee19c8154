"""What is ours is for no other user of the machine, whoever made the folder around it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_ray import private_files
from flux_ray.jobs.database import Database, shared_secret
from flux_ray.jobs.images import Results
from flux_ray.private_files import is_open_to_others, make_folder
from flux_ray.request import GeneratedImage, ImageRequest
from flux_ray.router.trace import Recorder

JOB = "01234567-0123-0123-0123-0123456789ab"
IMAGES = (GeneratedImage(b"pixels", 1),)
REQUEST = ImageRequest("r", "tiny", "words", 64, 64, 4, 1.0, seed=7)


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """By which a file that is made without care can be read by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def open_folder(tmp_path) -> Path:
    """Made by somebody else, for everybody."""
    folder = tmp_path / "there before"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


def modes_in(folder: Path) -> set[tuple[bool, str]]:
    """Whether each of all that is below it is a folder, and its mode."""
    return {(each.is_dir(), oct(each.stat().st_mode & 0o777)) for each in folder.rglob("*")}


async def test_the_job_database_in_a_folder_that_was_there_before(open_folder):
    database = Database(f"sqlite:///{open_folder}/jobs.sqlite3")
    await database.create()
    await shared_secret(database, "result-urls")
    assert {each.name for each in open_folder.iterdir()} >= {"jobs.sqlite3", "jobs.sqlite3-wal"}
    assert modes_in(open_folder) == {(False, "0o600")}
    await database.close()


async def test_a_database_that_an_earlier_release_left_open_is_closed(open_folder, serve_log):
    path = open_folder / "jobs.sqlite3"
    path.touch(mode=0o644)
    database = Database(f"sqlite:///{path}")
    await database.create()
    assert modes_in(open_folder) == {(False, "0o600")}
    assert serve_log.text == ""
    await database.close()


async def test_a_database_that_is_not_ours_to_close_is_warned_of(
    open_folder, serve_log, monkeypatch
):
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = open_folder / "jobs.sqlite3"
    path.touch(mode=0o644)
    monkeypatch.setattr(private_files.Path, "chmod", refuse)
    database = Database(f"sqlite:///{path}")
    await database.create()
    [warning] = [each.getMessage() for each in serve_log.records if each.levelname == "WARNING"]
    assert f"chmod 700 '{open_folder}'" in warning
    await database.close()


async def test_results_in_a_folder_that_was_there_before(open_folder, serve_log):
    results = Results(str(open_folder))
    await results.write_images(JOB, 1, IMAGES, "png")
    await results.write_references(JOB, (b"pixels",))
    assert modes_in(open_folder) == {(True, "0o700"), (False, "0o600")}
    await results.warn_of_others()
    assert serve_log.text == "", "nobody can come to them"


async def test_results_that_an_earlier_release_left_open_are_warned_of(open_folder, serve_log):
    (open_folder / JOB).mkdir(mode=0o755)
    await Results(str(open_folder)).warn_of_others()
    [warning] = [each.getMessage() for each in serve_log.records]
    assert f"chmod -R go= '{open_folder}'" in warning
    open_folder.chmod(0o700)
    await Results(str(open_folder)).warn_of_others()
    assert len(serve_log.records) == 1


async def test_every_folder_that_is_missing_is_made_for_nobody_else(open_folder):
    make_folder(open_folder / "a" / "b" / "c")
    make_folder(open_folder / "a" / "b" / "c")
    assert modes_in(open_folder) == {(True, "0o700")}
    assert is_open_to_others(open_folder), "it is not ours"


def test_traces_in_a_folder_that_was_there_before(open_folder):
    recorder = Recorder(open_folder / "trace.jsonl", max_bytes=150)
    for _ in range(3):
        recorder.record(REQUEST, 1.0, None)
    recorder.close()
    assert len(list(open_folder.iterdir())) == 2
    assert modes_in(open_folder) == {(False, "0o600")}
