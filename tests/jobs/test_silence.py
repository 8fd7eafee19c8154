"""Leases by signs of life: clocks that are set take no job away, and a lost one is found soon."""

import asyncio
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from flux_ray.jobs.database import Database
from flux_ray.jobs.job import JobSubmission
from flux_ray.jobs.serialization import pack
from flux_ray.jobs.statements import (
    MAX_SILENT,
    Sign,
    Wanted,
    claim_of,
    next_job,
    running,
    sign_of,
)
from flux_ray.jobs.store import MAX_GAP, Silence, Store
from flux_ray.request import PROTOCOL, ImageRequest
from tests.jobs.conftest import KEEP_S, LEASE_S, Clock


async def accept(store, offer):
    return await store.accept(offer, pack(offer.request).row, is_whole=True)


@pytest.fixture
def wall(clock) -> Clock:
    """The database's clock; the gateways' own is `clock`."""
    wall = Clock()
    wall.now_s = 1_800_000_000.0
    return wall


@pytest.fixture
async def shared(database_url, wall):
    database = Database(database_url, wall)
    await database.create()
    yield database
    await database.close()


@pytest.fixture
def gateways(shared, clock) -> list[Store]:
    return [Store(shared, LEASE_S, KEEP_S, clock) for _ in range(2)]


async def watch_for(store, clock, seconds, beats=None):
    """Time passes while a gateway watches, and a worker beats if there is one."""
    await store.watch()
    for _ in range(16):
        clock.now_s += seconds / 16
        if beats is not None:
            assert await beats()
        await store.watch()


@pytest.mark.parametrize("jump_s", [31, -3600, 90_000])
async def test_a_clock_that_is_set_takes_no_running_job_away(gateways, offer, clock, wall, jump_s):
    mine, other = gateways
    job = await accept(mine, offer())
    lease = await mine.claim("mine")
    await watch_for(other, clock, 5)
    wall.now_s += jump_s
    assert await other.claim("other") is None
    await watch_for(other, clock, 5 * LEASE_S, lambda: mine.beat(lease))
    assert await other.claim("other") is None
    found = await mine.find("anna", job.job_id)
    assert (found.status, found.attempt, found.num_lost) == ("running", 1, 0)


@pytest.mark.parametrize("jump_s", [0, 31, -3600])
async def test_a_lost_job_is_found_as_soon_whatever_the_clock(gateways, offer, clock, wall, jump_s):
    lost, other = gateways
    job = await accept(lost, offer())
    await lost.claim("lost")
    await other.watch()
    wall.now_s += jump_s
    await watch_for(other, clock, LEASE_S)
    lease = await other.claim("other")
    assert (lease.job_id, lease.attempt, lease.job.num_lost) == (job.job_id, 2, 1)


@pytest.mark.parametrize("jump_s", [31, -3600])
async def test_a_job_that_waits_is_claimed_whatever_the_clock(gateways, offer, wall, jump_s):
    job = await accept(gateways[0], offer())
    wall.now_s += jump_s
    assert (await gateways[1].claim("w")).job_id == job.job_id


async def test_a_pause_does_not_grow_when_the_clock_is_set_back(gateways, offer, wall):
    store = gateways[0]
    await accept(store, offer())
    await store.give_back(await store.claim("w"), after_s=20)
    wall.now_s += 5
    assert await store.claim("w") is None
    wall.now_s -= 3600
    assert await store.claim("w") is not None


async def test_a_sign_just_before_the_claim_keeps_the_job(gateways, offer, clock):
    mine, other = gateways
    await accept(mine, offer())
    lease = await mine.claim("mine")
    await watch_for(other, clock, LEASE_S)
    assert await mine.beat(lease)
    assert await other.claim("other") is None
    assert await mine.beat(lease)


async def test_two_who_saw_it_lost_take_it_once(gateways, offer, clock):
    mine, other = gateways
    await accept(mine, offer())
    await mine.claim("lost")
    await asyncio.gather(watch_for(mine, clock, LEASE_S), watch_for(other, clock, LEASE_S))
    claims = await asyncio.gather(mine.claim("a"), other.claim("b"))
    assert sum(lease is not None for lease in claims) == 1
    assert await mine.claim("a") is None


@pytest.mark.parametrize(("num_others", "is_named"), [(2 * MAX_SILENT, False), (1500, True)])
async def test_any_number_may_be_lost_at_once(shared, gateways, offer, num_others, is_named):
    job = await accept(gateways[0], offer())
    await gateways[0].claim("lost")
    [row] = await shared.execute(running())
    silent = {f"another {number}": Sign(1, 0, 0.0) for number in range(num_others)}
    silent[job.job_id] = sign_of(row)
    found = next_job(Wanted(), silent, shared.now, PROTOCOL)
    claimed = await shared.first(claim_of("other", found, shared.now, LEASE_S))
    assert (claimed is not None) == is_named


async def test_a_worker_of_the_release_before_keeps_its_job_by_the_leases_end(
    shared, gateways, offer, clock
):
    """It knows of no beats: each of its own moves the end."""
    job = await accept(gateways[0], offer())
    await gateways[0].claim("old")
    ends_at_s = count(2_000_000_000)

    async def beats() -> bool:
        query = f"UPDATE flux_jobs SET claimable_at_s = {next(ends_at_s)}"
        async with shared.connect() as connection:
            await connection.execute(text(query))
        return True

    await watch_for(gateways[1], clock, 3 * LEASE_S, beats)
    assert await gateways[1].claim("new", Wanted()) is None
    assert (await gateways[1].find("anna", job.job_id)).num_lost == 0


async def test_an_outage_of_the_store_takes_no_job_away(gateways, offer, clock):
    """Who comes back first finds the others as they were: they could give no sign either."""
    mine, other = gateways
    await accept(mine, offer())
    lease = await mine.claim("mine")
    await other.watch()
    clock.now_s += 100 * LEASE_S
    await other.watch()
    assert await other.claim("other") is None
    assert await mine.beat(lease)


async def test_whoever_has_just_begun_takes_nobodys_job(gateways, offer, clock):
    mine, new = gateways
    await accept(mine, offer())
    await mine.claim("mine")
    clock.now_s += 100 * LEASE_S
    await new.watch()
    assert await new.claim("new") is None


@dataclass
class World:
    """Workers that beat or are lost, and a gateway that watches; time goes by in steps of 1 s."""

    store: Store
    clock: Clock
    wall: Clock
    # Of a worker that lives: when it beat last. Of one that is lost: when it did for the last time.
    living: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    leases: dict[str, object] = field(default_factory=dict)

    async def pass_one_s(self) -> None:
        self.clock.now_s += 1
        self.wall.now_s += 1
        for job_id, beat_at_s in self.living.items():
            if self.clock.now_s - beat_at_s >= LEASE_S / 3:
                assert await self.store.beat(self.leases[job_id]), "a living worker lost its job"
                self.living[job_id] = self.clock.now_s
        await self.store.watch()

    async def claim(self) -> None:
        while (lease := await self.store.claim("w")) is not None:
            assert lease.job_id not in self.living, "a living worker's job was claimed"
            assert (lease.job.num_lost > 0) == (lease.job_id in self.lost)
            self.lost.pop(lease.job_id, None)
            self.leases[lease.job_id] = lease
            self.living[lease.job_id] = self.clock.now_s

    def lose(self, number: int) -> None:
        if self.living:
            job_id = sorted(self.living)[number % len(self.living)]
            self.lost[job_id] = self.living.pop(job_id)

    def check_lost(self) -> None:
        """The next look is a second later, and the claim after that finds it."""
        for last_sign_s in self.lost.values():
            assert self.clock.now_s - last_sign_s <= LEASE_S + 2, "a lost job is not found"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.integers(1, 12)),
        st.tuples(st.just("set"), st.sampled_from([31, -31, 3600, -3600, 86_400, -1])),
        st.tuples(st.just("lose"), st.integers(0, 3)),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def new_file(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("worlds"), count()
    return lambda: f"sqlite:///{folder}/{next(numbers)}.sqlite3"


def offer_of(seed: int) -> JobSubmission:
    return JobSubmission("anna", ImageRequest("r", "tiny", "a ring", 64, 48, 4, 1.0, seed))


async def live(database: Database, clock: Clock, wall: Clock, steps) -> None:
    world = World(Store(database, LEASE_S, 1e9, clock), clock, wall)
    for seed in range(3):
        await accept(world.store, offer_of(seed))
    await world.store.watch()
    await world.claim()
    for what, how_far in steps:
        if what == "lose":
            world.lose(how_far)
        elif what == "set":
            wall.now_s += how_far
            await world.claim()
        for _ in range(how_far if what == "pass" else 0):
            await world.pass_one_s()
            await world.claim()
            world.check_lost()


def check_steps(new_file, steps) -> None:
    async def run() -> None:
        clock, wall = Clock(), Clock()
        database = Database(new_file(), wall)
        await database.create()
        try:
            await live(database, clock, wall, steps)
        finally:
            await database.close()

    asyncio.run(run())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_leases_hold_whatever_the_clock_is_set_to(new_file, steps):
    check_steps(new_file, steps)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_leases_hold_in_many_worlds(new_file, steps):
    check_steps(new_file, steps)


@given(
    gaps_s=st.lists(st.floats(0, 30), max_size=40),
    signs=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_silence_is_never_longer_than_it_was_watched(gaps_s, signs):
    clock = Clock()
    silence: Silence[int] = Silence(LEASE_S, clock)
    mark, unchanged_s, seen = 0, 0.0, False
    for gap_s, is_sign in zip(gaps_s, signs, strict=False):
        clock.now_s += gap_s
        mark += is_sign
        unchanged_s = 0.0 if is_sign or not seen else unchanged_s + min(gap_s, LEASE_S * MAX_GAP)
        seen = True
        silence.look({"job": mark}, silence.begin())
        assert ("job" in silence.silent) == (unchanged_s >= LEASE_S) or abs(
            unchanged_s - LEASE_S
        ) < 1e-6
