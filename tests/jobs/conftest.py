"""Stores to test with: SQLite and PostgreSQL, whose time a test may tell, a folder and S3."""

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from flux_ray.jobs.database import Database
from flux_ray.jobs.images import Results
from flux_ray.jobs.job import JobSubmission
from flux_ray.jobs.store import Store
from flux_ray.request import ImageRequest
from tests.jobs.servers import S3, Postgres

LEASE_S = 10.0
KEEP_S = 100.0
# So many that none of the pauses between them is too long.
NUM_LOOKS = 16


class Clock:
    """The time that a test tells."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"PostgreSQL cannot be started here: {error}")
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/jobs.sqlite3"
        return
    server = request.getfixturevalue("postgres")
    url = server.new_database()
    yield url
    server.give_back(url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def database(database_url, clock) -> AsyncIterator[Database]:
    database = Database(database_url, clock)
    await database.create()
    yield database
    await database.close()


@pytest.fixture
def store(database, clock) -> Store:
    return Store(database, LEASE_S, KEEP_S, clock)


@pytest.fixture
def pass_s(store, clock) -> Callable[[float], Awaitable[None]]:
    """`await pass_s(5)`: time passes, on every clock, and the store watches meanwhile."""

    async def go_on(seconds: float) -> None:
        await store.watch()
        for _ in range(NUM_LOOKS):
            clock.now_s += seconds / NUM_LOOKS
            await store.watch()

    return go_on


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path) -> Results:
    return Results(str(tmp_path / "results"))


@pytest.fixture
def offer() -> Callable[..., JobSubmission]:
    """`offer(seed, owner)`: what a caller wants."""

    def make(seed: int = 7, owner: str = "anna", references=(), **rest) -> JobSubmission:
        request = ImageRequest(
            "r", "tiny", f"image {seed}", 64, 48, 4, 1.0, seed, references=references
        )
        return JobSubmission(owner, request, **rest)

    return make
