"""Traces: read as they were written, and what is wrong is named with its line and key."""

import itertools
import json
import random
import statistics
from dataclasses import replace

import pytest

from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.router.pricing import ReplicaSpec
from flux_ray.router.trace import BadTrace, TracedRequest, parse_line
from flux_ray.simulator.fleet import cost_s
from flux_ray.simulator.traffic import (
    Traffic,
    bursty,
    diurnal,
    from_zero,
    generate,
    last_arrival_s,
    read_trace,
    sample_of,
    times_for,
    write_trace,
)

ENTRY = TracedRequest(1.5, "flux-2-dev", 768, 512, 28, 2, 3, 40.0, "team")


def test_as_it_was_written(tmp_path):
    path = tmp_path / "trace.jsonl"
    entries = [ENTRY, TracedRequest(2.0, "tiny", 64, 96, 4)]
    assert write_trace(path, entries) == 2
    assert list(read_trace(path)) == entries
    first, second = path.read_text().splitlines()
    assert json.loads(first)["deadline_s"] == 40.0
    assert "deadline_s" not in json.loads(second)


def test_what_is_not_said_is_the_tiers_default():
    entry = parse_line('{"at_s": 3, "tier": "flux-2-klein-4b"}')
    assert entry == TracedRequest(3.0, "flux-2-klein-4b", 1024, 1024, 4, 0, 1, None, "")


def test_a_request_that_steers_away_from_a_prompt_costs_two_forwards(tmp_path):
    """If a trace says nothing of it, as old ones, it is what the tier always does."""
    assert parse_line('{"at_s": 0, "tier": "flux-1-dev"}').forwards == 1
    assert parse_line('{"at_s": 0, "tier": "flux-2-klein-4b-base"}').forwards == 2
    one = parse_line('{"at_s": 0, "tier": "flux-1-dev"}')
    two = replace(one, forwards=2)
    write_trace(tmp_path / "trace.jsonl", [two])
    assert list(read_trace(tmp_path / "trace.jsonl")) == [two]
    layout = ReplicaSpec("h100-80gb")
    assert 1.8 < cost_s(two, layout) / cost_s(one, layout) < 2


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_generated_requests_are_within_the_tiers_limits(tier):
    for entry in sample_of(tier.name, 50):
        assert entry.width * entry.height <= tier.max_pixels
        assert tier.min_side <= entry.width <= tier.max_side
        assert entry.forwards == tier.num_forwards


GOOD = {"at_s": 1, "tier": "tiny"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD | {"colour": 1}, "unknown key 'colour'; known keys: at_s, deadline_s"),
        (GOOD | {"at_s": -1}, "at_s: -1 is negative"),
        (GOOD | {"at_s": "1"}, "at_s: '1' is no number of seconds"),
        (GOOD | {"at_s": True}, "at_s: True is no number of seconds"),
        (GOOD | {"at_s": float("nan")}, "at_s: nan is no number of seconds"),
        (GOOD | {"deadline_s": float("inf")}, "deadline_s: inf is no number of seconds"),
        (GOOD | {"deadline_s": 0}, "deadline_s: 0 is in the past"),
        (GOOD | {"tier": "huge"}, "tier: no tier named 'huge'; known tiers: tiny"),
        (GOOD | {"tier": 4}, "tier: 4 is no text"),
        (GOOD | {"key": None}, "key: None is no text"),
        (GOOD | {"steps": 0}, "steps: 0 is no whole number from 1 on"),
        (GOOD | {"width": 64.5}, "width: 64.5 is no whole number"),
        (GOOD | {"images": False}, "images: False is no whole number"),
        (GOOD | {"references": -1}, "references: -1 is no whole number from 0 on"),
        ({"tier": "tiny"}, "at_s is missing"),
        ({"at_s": 1}, "tier is missing"),
        ([1], "not a JSON object"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(line, reason, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n")
    entries = read_trace(path)
    next(entries)
    with pytest.raises(BadTrace) as caught:
        next(entries)
    assert str(caught.value).startswith(f"{path} line 2: {reason}")


@pytest.mark.parametrize("text", ["", "{", "at_s: 1"])
def test_no_json(text, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{text}\n")
    with pytest.raises(BadTrace, match="line 1: no JSON"):
        list(read_trace(path))


def test_time_does_not_run_backwards(tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(path, [ENTRY, TracedRequest(1.0, "tiny", 64, 64, 4)])
    with pytest.raises(BadTrace, match=r"line 2: at_s: 1 is before 1\.5"):
        list(read_trace(path))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("none", "bytes"):
        with pytest.raises(BadTrace, match=f"{name} cannot be read"):
            list(read_trace(tmp_path / name))


def test_it_is_read_as_it_is_used(tmp_path):
    """The line that is wrong is met when it is reached, and not before."""
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n" * 5 + "{\n")
    assert len(list(itertools.islice(read_trace(path), 5))) == 5


def test_a_recording_begins_at_zero(tmp_path):
    recorded = [TracedRequest(1.7e9 + second, "tiny", 64, 64, 4) for second in (0, 1, 5)]
    assert [entry.at_s for entry in from_zero(recorded)] == [0, 1, 5]
    path = tmp_path / "trace.jsonl"
    write_trace(path, recorded)
    assert last_arrival_s(path) == 5
    path.write_text("")
    assert last_arrival_s(path) == 0


TRAFFIC = (Traffic("flux-2-dev", 0.5, "bursty"), Traffic("flux-2-klein-4b", 2.0, "burst"))


def test_a_seed_gives_the_same_trace():
    once, again, other = (list(generate(TRAFFIC, 900, seed)) for seed in (7, 7, 8))
    assert once == again != other
    assert [entry.at_s for entry in once] == sorted(entry.at_s for entry in once)
    assert {entry.tier for entry in once} == {"flux-2-dev", "flux-2-klein-4b"}


def test_another_tier_changes_nothing():
    both = [entry for entry in generate(TRAFFIC, 900, 7) if entry.tier == "flux-2-dev"]
    assert both == list(generate(TRAFFIC[:1], 900, 7))


@pytest.mark.parametrize("pattern", ["poisson", "bursty", "diurnal"])
def test_the_mean_rate_is_kept(pattern):
    num = sum(1 for _ in times_for(pattern, 0.5, 86_400, random.Random(1)))
    assert num == pytest.approx(43_200, rel=0.05)


@pytest.mark.parametrize("cv", [1.0, 3.0])
def test_gaps_vary_as_said(cv):
    times = list(bursty(10.0, 5000.0, random.Random(2), cv))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)


def test_a_burst_is_ten_times_as_much_for_two_minutes():
    times = list(times_for("burst", 5.0, 1200.0, random.Random(3)))
    inside = sum(540 <= at_s < 660 for at_s in times)
    assert inside / 120 == pytest.approx(50, rel=0.05)
    assert (len(times) - inside) / 1080 == pytest.approx(5, rel=0.05)


def test_a_day_has_a_night():
    times = list(diurnal(1.0, 86_400.0, random.Random(4)))
    night = sum(at_s < 7200 for at_s in times)
    noon = sum(39_600 <= at_s < 46_800 for at_s in times)
    assert noon / night > 3


def test_no_traffic():
    assert list(generate([Traffic("tiny", 0.0)], 100, 0)) == []


@pytest.mark.parametrize(
    ("tier", "sides", "steps"),
    [
        ("flux-2-dev", {512, 768, 1024, 1536}, {20, 25, 35}),
        ("flux-2-klein-4b", {512, 768, 1024, 1536}, {4}),
        ("tiny", {64, 96, 128, 192}, {4}),
    ],
)
def test_shapes_are_those_of_the_tier(tier, sides, steps):
    entries = sample_of(tier, 2000)
    assert {entry.width for entry in entries} == sides
    assert {entry.steps for entry in entries} == steps
    row = tier_for(tier)
    assert max(entry.references for entry in entries) == min(3, row.max_references)
    assert all(entry.width * entry.height <= row.max_pixels for entry in entries)
    share = sum(entry.width == row.default_side for entry in entries) / len(entries)
    assert share == pytest.approx(0.45, abs=0.04)
    counts = [sum(entry.key == f"key-{number}" for entry in entries) for number in (1, 20)]
    assert counts[0] > 10 * counts[1] > 0
