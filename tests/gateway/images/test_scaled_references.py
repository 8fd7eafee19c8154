"""References reach replicas as small as their tier takes them, scaled as ranks do to the pixel."""

import base64
import io
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flux_ray import request as requests
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.engine.images import image_for, raster_for
from flux_ray.gateway.fields.sizes import lone_canvas
from flux_ray.gateway.images import decode as references
from flux_ray.gateway.images import file_formats
from flux_ray.gateway.images.decode import decode, decode_reference, whole_image
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.gateway.openai.request import request_for
from flux_ray.request import ImageRequest, RgbImage
from flux_ray.resizing import fit_image, fit_mask
from flux_ray.router.pricing.cost import ReplicaSpec, work_of
from flux_ray.router.pricing.cost_model import CostModel, affinity_of

LIMITS = Limits()
TINY, KLEIN = tier_for("tiny"), tier_for("flux-2-klein-4b")
FLUX_3 = tier_for("flux-3-klein")
MAX_PIXELS = {tier.max_reference_pixels for tier in (TINY, KLEIN)}
EDITS = "/v1/images/edits"


@pytest.fixture
def gateway_args() -> GatewayArgs:
    """Noise takes many bytes."""
    return GatewayArgs(tiers=("tiny",))


def noisy(width: int, height: int, *, mode="RGB", format="PNG") -> bytes:
    channels = len(mode)
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, format)
    return file.getvalue()


def as_a_rank_does(raster: RgbImage, max_pixels: int) -> RgbImage:
    """diffusers' own scaling."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    return raster_for(Flux2ImageProcessor._resize_if_exceeds_area(image_for(raster), max_pixels))


@pytest.mark.parametrize(
    "size", [(64, 64), (192, 192), (193, 192), (1201, 333), (999, 1777), (1024, 1024), (1025, 1024)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_each_tier_gets_the_pixels_that_a_rank_would_make(size, mode):
    data = noisy(*size, mode=mode)
    whole = decode(data, LIMITS, "image 1")
    sent = decode_reference(data, LIMITS, "image 1", MAX_PIXELS)
    assert (sent.width, sent.height) == size
    for limit in MAX_PIXELS:
        scaled = sent.raster_for(limit)
        assert scaled == as_a_rank_does(whole, limit)
        assert as_a_rank_does(scaled, limit) == scaled, "a rank has nothing left to do"
        assert scaled.width * scaled.height <= limit or scaled == whole


@pytest.mark.parametrize("size", [(2600, 1700), (600, 4200), (100, 70)])
def test_a_lone_reference_is_scaled_once_for_its_canvas(size):
    """To what diffusers makes of the image that was sent, and a rank of the scaled one."""
    from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor

    data, limit, processor = noisy(*size), FLUX_3.reference_limit(1), Flux3ImageProcessor()
    sent = decode_reference(data, LIMITS, "image 1", [limit])
    pixels, crop = processor.preprocess(image_for(sent.raster_for(limit)))
    expected, expected_crop = processor.preprocess(image_for(decode(data, LIMITS, "image 1")))
    assert crop == expected_crop and pixels.equal(expected)
    canvas = lone_canvas((sent,), FLUX_3)
    assert {"reference_crop": canvas.box} == crop
    assert (canvas.height, canvas.width) == pixels.shape[-2:]


def test_limits_that_change_nothing_share_the_pixels():
    sent = decode_reference(noisy(100, 100), LIMITS, "image 1", MAX_PIXELS)
    first, second = (sent.raster_for(limit) for limit in MAX_PIXELS)
    assert first is second


def test_what_the_model_would_refuse_when_scaled_is_left_to_it():
    """8:1 is taken, and would be longer in whole pixels."""
    sent = decode_reference(noisy(1600, 200), LIMITS, "image 1", MAX_PIXELS)
    raster = sent.raster_for(TINY.max_reference_pixels)
    assert (raster.width, raster.height) == (1600, 200)


@pytest.mark.parametrize("tier", [TINY, KLEIN], ids=lambda tier: tier.name)
def test_price_and_size_are_those_of_what_was_sent(tier):
    data, fields = noisy(1300, 900), ImageFields(prompt="a ring", seed=1)
    whole = whole_image(decode(data, LIMITS, "image 1"), MAX_PIXELS)
    scaled = decode_reference(data, LIMITS, "image 1", MAX_PIXELS)
    before, after = (
        request_for(fields, tier, LIMITS, RequestImages((each,))) for each in (whole, scaled)
    )
    assert (before.width, before.height) == (after.width, after.height)
    assert work_of(before) == work_of(after)
    assert len(after.references[0].rgb) <= 3 * tier.max_reference_pixels


async def test_an_edit_sends_what_its_tier_takes(client, handles, router):
    body = {"prompt": "a ring", "image": base64.b64encode(noisy(700, 500)).decode()}
    assert (await client.post(EDITS, json=body)).status_code == 200
    [reference] = handles.requests[0].references
    assert (reference.width, reference.height) == (227, 162)
    assert (handles.requests[0].width, handles.requests[0].height) == (192, 128)


async def test_under_a_mask_both_have_the_size_generated(client, handles):
    image, mask = noisy(700, 500), Image.new("L", (700, 500))
    mask.paste(255, (100, 100, 300, 203))
    file = io.BytesIO()
    mask.save(file, "PNG")
    files = [("image", ("a.png", image)), ("image", ("b.png", noisy(400, 400)))]
    files.append(("mask", ("m.png", file.getvalue())))
    form = {"prompt": "a ring", "size": "160x128"}
    assert (await client.post(EDITS, data=form, files=files)).status_code == 200
    request = handles.requests[0]
    whole = decode(image, LIMITS, "image 1")
    assert request.references[0] == fit_image(whole, (160, 128))
    assert (request.references[1].width, request.references[1].height) == (192, 192)
    marks = requests.Mask(700, 500, mask.tobytes())
    assert request.mask == fit_mask(marks, (160, 128))


async def test_each_tier_of_an_alias_has_its_own(handles, turns, bill, make_image):
    """They are made at once, from the pixels that were sent."""
    import httpx

    from flux_ray.gateway.api import build_api
    from flux_ray.router.router import Router, Terms

    layouts = {name: ReplicaSpec("cpu", dtype="float32") for name in ("tiny", "flux-2-klein-4b")}
    router = Router(handles, turns, CostModel(layouts), bill, Terms(request_timeout_s=600))
    seen: list[ImageRequest] = []
    by = router.generate_by

    async def watch(alias, asked, *rest):
        seen.extend(asked)
        return await by(alias, asked, *rest)

    router.generate_by = watch
    alias = {"best": {"tiers": ["flux-2-klein-4b", "tiny"]}}
    args = GatewayArgs.model_validate({"tiers": tuple(layouts), "aliases": alias})
    data = noisy(1400, 1000)
    transport = httpx.ASGITransport(app=build_api(router, args), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        body = {"prompt": "a ring", "model": "best", "image": base64.b64encode(data).decode()}
        assert (await client.post(EDITS, json=body)).status_code == 200
    whole = decode(data, LIMITS, "image 1")
    assert [each.tier for each in seen] == ["flux-2-klein-4b", "tiny"]
    for request in seen:
        limit = tier_for(request.tier).max_reference_pixels
        assert request.references == (as_a_rank_does(whole, limit),)
    # Of what gateways may hold, it would be missing in the tests that come after.
    seen.clear()


async def test_nothing_is_decoded_scaled_or_hashed_on_the_event_loop(client, handles, monkeypatch):
    threads: dict[str, str] = {}

    def watched(name, call):
        def watch(*args, **rest):
            threads[name] = threading.current_thread().name
            return call(*args, **rest)

        return watch

    monkeypatch.setattr(references, "to_rgb", watched("decode", references.to_rgb))
    monkeypatch.setattr(references, "scale_down", watched("scale", references.scale_down))
    hashing = requests.sha256

    def sha256(data=b""):
        # Of pixels, not of names: they begin with their size.
        if data.startswith(b"700x") or data.startswith(b"227x"):
            threads["hash"] = threading.current_thread().name
        return hashing(data)

    monkeypatch.setattr(requests, "sha256", sha256)
    body = {"prompt": "a ring", "image": base64.b64encode(noisy(700, 500)).decode()}
    assert (await client.post(EDITS, json=body)).status_code == 200
    assert set(threads) == {"decode", "scale", "hash"}
    assert all(name.startswith("decode") for name in threads.values())
    threads.clear()
    prices = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})
    affinity_of(handles.requests[0], prices)
    # Who gets it in another process need not hash it either.
    travelled = pickle.loads(pickle.dumps(handles.requests[0]))
    assert travelled.references_name == handles.requests[0].references_name
    assert threads == {}
    fresh = replace(travelled.references[0])
    assert fresh.digest == travelled.references[0].digest
    assert file_formats.DECODERS._num_free >= 1
