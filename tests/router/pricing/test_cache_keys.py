"""What a request shares with those that a replica has done, and what that saves."""

from dataclasses import replace

import pytest

from flux_ray.request import ImageRequest, RgbImage, StageTimes
from flux_ray.router.pricing.cost import ReplicaSpec, price, work_of
from flux_ray.router.pricing.cost_model import CostModel, affinity_of
from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue

RED, BLUE = (RgbImage(1024, 1024, bytes([shade]) * (1024 * 1024 * 3)) for shade in (200, 30))
ASKED = ImageRequest("id", "flux-2-dev", "a ring", 1024, 1024, 28, 4.0, seed=7)
EDIT = replace(ASKED, references=(RED, BLUE))


def prices(**layout) -> CostModel:
    return CostModel({"flux-2-dev": ReplicaSpec("h100-80gb", tensor=2, **layout)})


def test_its_names_are_those_of_words_and_pixels():
    (prompt,) = affinity_of(ASKED, prices())
    assert prompt == affinity_of(replace(ASKED, seed=8, request_id="other"), prices())[0]
    assert prompt != affinity_of(replace(ASKED, prompt="a disc"), prices())[0]
    same, references = affinity_of(EDIT, prices())
    assert same == prompt
    assert affinity_of(replace(EDIT, references=(BLUE, RED)), prices())[1][0] != references[0]


def test_what_is_saved_is_the_price_of_encoding():
    learned = prices()
    saved_s = sum(seconds for _, seconds in affinity_of(EDIT, learned))
    assert saved_s == pytest.approx(learned.price(EDIT).encode_s)
    before = learned.price(EDIT)
    for _ in range(3):
        times = StageTimes(0.0, 2 * before.encode_s, before.denoise_s, before.decode_s)
        learned.learn(EDIT, times)
    saved_s = sum(seconds for _, seconds in affinity_of(EDIT, learned))
    assert saved_s == pytest.approx(2 * before.encode_s)


def test_a_prompt_to_steer_away_from_is_known_too_unless_every_replica_has_it():
    model = CostModel({"flux-1-dev": ReplicaSpec("h100-80gb")})
    asked = replace(ASKED, tier="flux-1-dev", negative_prompt="a disc", true_cfg_scale=2.0)
    (prompt, saved_s), negative = affinity_of(asked, model)
    assert negative == affinity_of(replace(asked, prompt="a disc"), model)[0]
    assert prompt != negative[0] and saved_s == negative[1] > 0
    noise_s = price(work_of(asked), ReplicaSpec("h100-80gb")).encode_s - 2 * saved_s
    assert noise_s == pytest.approx(0.2e-3)
    assert affinity_of(replace(asked, negative_prompt=""), model) == ((prompt, saved_s),)


def test_a_control_image_is_known_by_its_pixels():
    model = CostModel({"flux-1-canny-dev": ReplicaSpec("h100-80gb")})
    asked = replace(ASKED, tier="flux-1-canny-dev", references=(RED,), follows_reference=True)
    saved_s = sum(seconds for _, seconds in affinity_of(asked, model))
    assert saved_s == pytest.approx(model.price(asked).encode_s)


def test_a_shared_encoder_knows_prompts_for_all_and_no_cache_knows_nothing():
    (name, _) = affinity_of(EDIT, prices(is_encoder_shared=True))[0]
    assert name.startswith("r:")
    assert affinity_of(EDIT, prices(has_cache=False)) == ()


def test_keys_and_values_that_no_cache_has_room_for_are_known_to_nobody():
    """Those of a reference at 1 MP are 2 GiB, and the default cache has 64 MiB."""
    asked = replace(EDIT, tier="flux-2-klein-9b-kv", references=(RED,))
    num_bytes = 2**31

    def names(**layout) -> list[str]:
        model = CostModel({asked.tier: ReplicaSpec("h100-80gb", **layout)})
        return [name for name, _ in affinity_of(asked, model)]

    assert names() == names(cache_bytes=num_bytes - 1) == [asked.prompt_name]
    assert names(cache_bytes=num_bytes) == [asked.prompt_name, asked.references_name]
    assert len(names(cache_bytes=num_bytes // 2, tensor=2)) == 2, "each rank keeps its heads"


def test_what_was_known_teaches_no_price_of_encoding():
    learned = prices()
    before = learned.price(ASKED)
    for _ in range(3):
        seen = learned.learn(ASKED, StageTimes(0.0, 1e-4, 9.0, 0.3, is_cached=True))
    assert {each.stage for each in seen} == {"denoise", "decode"}
    assert learned.price(ASKED).encode_s == before.encode_s
    assert learned.price(ASKED).denoise_s == pytest.approx(9.0)


def test_the_queue_goes_back_to_the_replica_that_knows_it():
    """Of two idle replicas, the one that has encoded the references; not if it is busier."""
    queue = TierQueue()
    queue.set_replicas(["a", "b"], 0.0)
    affinity = affinity_of(EDIT, prices())

    def grant(name: str, affinity, now: float) -> str:
        queue.submit(QueuedRequest(name, "flux-2-dev", 5.0, 1000.0, affinity=affinity), now)
        ((_, replica),) = queue.take(now)[0]
        return replica

    first = grant("1", affinity, 0.0)
    other = grant("2", (), 0.0)
    assert {first, other} == {"a", "b"}
    queue.finish("2", 1.0)
    queue.finish("1", 2.0)
    assert grant("3", affinity, 3.0) == first
    assert grant("4", affinity, 3.0) == other, "to wait would cost more than it saves"


def test_a_replica_that_is_gone_is_not_missed():
    queue = TierQueue()
    queue.set_replicas(["a"], 0.0)
    affinity = affinity_of(EDIT, prices())
    queue.submit(QueuedRequest("1", "flux-2-dev", 5.0, 1000.0, affinity=affinity), 0.0)
    queue.take(0.0)
    queue.set_replicas(["b"], 1.0)
    queue.submit(QueuedRequest("2", "flux-2-dev", 5.0, 1000.0, affinity=affinity), 1.0)
    ((_, replica),) = queue.take(1.0)[0]
    assert replica == "b"
