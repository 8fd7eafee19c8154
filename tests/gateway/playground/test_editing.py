"""References, masks, keys, colours, small screens and the keyboard, in a real browser."""

import io
import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill
from tests.gateway.playground.browser import (
    color_of,
    done,
    drop,
    generated,
    opened,
    page_of,
    paste,
    png,
    served,
    stroke,
)

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def marks_of(request) -> np.ndarray:
    mask = request.mask
    return np.frombuffer(mask.marks, np.uint8).reshape(mask.height, mask.width)


def first_pixel(reference) -> tuple[int, ...]:
    return tuple(reference.rgb[:3])


def test_references_are_dropped_pasted_chosen_and_put_in_order(page, painters):
    drop(page, {"red.png": png(RED, (96, 64))})
    expect(page.locator("#reference-list li")).to_have_count(1)
    # The image's own shape is the natural one for an edit of it.
    expect(page.locator("#presets input[value=match]")).to_be_checked()
    paste(page, png(GREEN))
    expect(page.locator("#reference-list li")).to_have_count(2)
    drop(page, {"blue.png": png(BLUE)})
    expect(page.locator("#notice")).to_contain_text("This model takes 2 references")
    page.get_by_role("button", name="Move left: reference 2").click()
    generated(page)
    [request] = painters.requests
    assert [first_pixel(each) for each in request.references] == [GREEN, RED]
    assert (request.width, request.height) == (128, 128)
    page.get_by_role("button", name="Remove: reference 1").click()
    page.set_input_files(
        "#reference-files", [{"name": "b", "mimeType": "image/png", "buffer": png(BLUE)}]
    )
    expect(page.locator("#reference-list li")).to_have_count(2)
    generated(page)
    assert [first_pixel(each) for each in painters.requests[1].references] == [RED, BLUE]
    assert (painters.requests[1].width, painters.requests[1].height) == (96, 64)


def test_a_file_that_is_no_image_is_refused_in_words(page, painters):
    drop(page, {"notes.png": b"no image"})
    expect(page.locator("#notice")).to_contain_text("notes.png is no image")
    expect(page.locator("#reference-list li")).to_have_count(0)


def test_a_result_is_edited_under_a_painted_mask(page, painters):
    generated(page)
    page.click('[data-name="reference"]')
    page.click(".mask-button")
    stroke(page, (0.1, 0.1), (0.4, 0.1))
    stroke(page, (0.1, 0.9), (0.4, 0.9))
    page.keyboard.press("Control+z")
    page.click("#mask-redo")
    page.click("#mask-undo")
    page.click("#mask-done")
    page.fill("#prompt", "make it green")
    # The mask is kept when the words change.
    expect(page.locator(".mask-button")).to_have_text("Edit mask")
    generated(page)
    marks = marks_of(painters.requests[1])
    assert marks.shape == (128, 128)
    assert set(np.unique(marks)) == {0, 255}
    assert marks[13, 13:51].all()
    assert not marks[64:].any()
    assert 0.05 < (marks == 255).mean() < 0.25


def test_a_mask_is_loaded_erased_inverted_and_cleared(page, painters):
    drop(page, {"red.png": png(RED, (96, 64))})
    page.click(".mask-button")
    half = np.zeros((32, 48, 3), np.uint8)
    half[:, :24] = 255
    page.set_input_files(
        "#mask-file", [{"name": "m.png", "mimeType": "image/png", "buffer": as_png(half)}]
    )
    expect(page.locator("#mask-help")).to_contain_text("m.png is loaded")
    page.check("[name=tool][value=erase]")
    stroke(page, (0.05, 0.5), (0.45, 0.5))
    page.click("#mask-invert")
    page.click("#mask-done")
    generated(page)
    marks = marks_of(painters.requests[0])
    assert marks.shape == (64, 96)
    assert marks[:, 52:].all()
    assert not marks[:8, :44].any()
    assert marks[32, 10:40].all()
    page.click(".mask-button")
    page.click("#mask-clear")
    page.click("#mask-done")
    generated(page)
    assert painters.requests[1].mask is None


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def locked(painting_router, tmp_path):
    """A gateway that asks for keys: its address, and a key."""
    key, secret = new_key("someone", None, datetime.now(UTC))
    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile(keys=(key,)))
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS, keys_file=path)
    with served(build_api(painting_router, args)) as address:
        yield address, secret


def test_a_key_stays_in_its_tab(browser, locked, painters):
    address, secret = locked
    with page_of(browser) as page:
        page.goto(f"{address}/")
        expect(page.locator("#notice")).to_contain_text("This server asks for an API key")
        page.get_by_role("button", name="Enter a key").click()
        page.fill("#key", secret)
        page.keyboard.press("Enter")
        page.wait_for_selector("#generate:enabled")
        generated(page)
        assert page.evaluate("sessionStorage.getItem('flux-ray-key')") == secret
        assert secret not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        page.click("#copy-request")
        for language in ("curl", "Python", "JavaScript"):
            page.get_by_role("tab", name=language).click()
            assert secret not in page.inner_text("#code")
            assert "YOUR_KEY" in page.inner_text("#code")
        page.check("#code-key")
        assert secret in page.inner_text("#code")
        page.keyboard.press("Escape")
        page.click("#key-button")
        page.click("text=Forget the key")
        expect(page.locator("#notice")).to_contain_text("no key in this tab")
        assert page.evaluate("sessionStorage.length") == 0


def background(page: Page) -> int:
    """Return how light the page is, 0 to 765."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in color[4:-1].split(","))


def test_dark_is_the_systems_choice_until_it_is_ones_own(browser, address, painters):
    with page_of(browser, color_scheme="dark") as page:
        opened(page, address)
        assert background(page) < 150
        page.click("#theme-button")
        assert background(page) > 600
        opened(page, address)
        assert background(page) > 600


def test_a_phone_has_all_of_it(browser, address, painters):
    with page_of(browser, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        opened(page, address)
        drop(page, {"red.png": png(RED)})
        page.click("#more summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.click(".mask-button")
        stroke(page, (0.3, 0.5), (0.6, 0.5))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.click("#mask-done")
        generated(page)
        expect(page.locator(".frame img")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert painters.requests[0].mask is not None


def test_all_of_it_works_without_a_mouse(page, painters):
    drop(page, {"red.png": png(RED)})
    page.locator(".mask-button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#mask-canvas")).to_be_focused()
    page.keyboard.down(" ")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    expect(page.locator(".mask-button")).to_have_text("Edit mask")
    expect(page.locator(".mask-button")).to_be_focused()
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    done(page)
    marks = marks_of(painters.requests[0])
    assert marks[64, 64:80].all()
    assert not marks[:40].any()
    assert unnamed_in(page) == []


def unnamed_in(page: Page) -> list[str]:
    """Return what can be used and has no name for those who do not see it."""
    return page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter(each => !(each.getAttribute("aria-label") || each.labels?.length
                || each.textContent.trim()))
            .map(each => each.outerHTML)"""
    )


# Tiers that heed what `tiny` does not.
HEEDING = ("flux-1-dev", "flux-1-canny-dev", "flux-1-fill-dev", "flux-3-klein-base")


@pytest.fixture
def heeding(painters, queue):
    """A gateway of tiers that heed more fields, and an LLM that does not answer: its address."""
    prices = CostModel({tier: ReplicaSpec("h100-80gb") for tier in HEEDING})
    is_deployed = HEEDING.__contains__
    router = Router(painters, queue, prices, FakeBill(), Terms(60), is_deployed=is_deployed)
    asked, by_default = {"flux-1-dev": {}}, {"flux-3-klein-base": {"by_default": True}}
    llm = {"url": "http://127.0.0.1:1/v1", "model": "scribe", "tiers": asked | by_default}
    args = GatewayArgs.model_validate(
        {"tiers": HEEDING, "default_tier": "flux-1-dev", "limits": LIMITS, "upsampling": llm}
    )
    with served(build_api(router, args)) as address:
        yield address


def copied(page: Page, button: str) -> tuple[str, str]:
    """Return the request that the button shows, for curl and for Python."""
    page.click(button)
    curl = page.inner_text("#code")
    page.get_by_role("tab", name="Python").click()
    python = page.inner_text("#code")
    page.get_by_role("tab", name="curl").click()
    page.keyboard.press("Escape")
    return curl, python


def test_what_a_tier_heeds_is_offered_sent_copied_and_recalled(browser, heeding, painters):
    with page_of(browser) as page:
        opened(page, heeding)
        page.click("#more summary")
        expect(page.locator("#scale-field")).to_be_hidden()
        page.get_by_label("Negative prompt", exact=True).fill("cars ")
        page.get_by_label("Scale of the negative prompt").fill("3")
        page.get_by_label("Let an LLM write it out in detail").check()
        drop(page, {"red.png": png(RED)})
        expect(page.locator("#strength-field")).to_be_hidden()
        # An image without a mask is nothing to this tier, which is said before it is sent.
        expect(page.locator("#references-need")).to_have_text(
            "This model needs a mask: paint the part to generate."
        )
        page.click("#generate")
        expect(page.locator(".mask-button")).to_be_focused()
        expect(page.locator("#status")).to_contain_text("needs a mask")
        assert painters.requests == []
        page.keyboard.press("Enter")
        expect(page.locator("#mask-canvas")).to_be_focused()
        stroke(page, (0.1, 0.1), (0.4, 0.1))
        page.click("#mask-done")
        expect(page.locator("#references-need")).to_have_text("")
        page.get_by_label("Strength").fill("0.5")
        generated(page)
        [request] = painters.requests
        assert (request.negative_prompt, request.true_cfg_scale) == ("cars", 3)
        assert (request.strength, request.mask is not None) == (0.5, True)
        # It was asked for: there is only nobody who does it.
        expect(page.locator(".warning")).to_contain_text("prompt_upsampling had no effect")
        curl, python = copied(page, '[data-name="code"]')
        assert '"negative_prompt": "cars", "true_cfg_scale": 3, "strength": 0.5' in python
        assert '"prompt_upsampling": True}' in python
        assert "'strength=0.5'" in curl and "'prompt_upsampling=true'" in curl
        assert "undefined" not in curl + python
        page.click("#reset")
        page.select_option("#model", "flux-1-fill-dev")
        for field in ("#negative-field", "#upsampling-field", "#strength-field", "#scale-field"):
            expect(page.locator(field)).to_be_hidden()
        page.click('[data-name="recall"]')
        expect(page.locator("#model")).to_have_value("flux-1-dev")
        shown = {name: page.input_value(f"#{name}") for name in ("negative", "scale", "strength")}
        assert shown == {"negative": "cars ", "scale": "3", "strength": "0.5"}
        expect(page.locator("#upsampling")).to_be_checked()
        expect(page.locator(".mask-button")).to_have_text("Edit mask")


def test_a_control_image_is_required_and_is_no_reference(browser, heeding, painters, tmp_path):
    with page_of(browser) as page:
        opened(page, heeding)
        drop(page, {"red.png": png(RED)})
        page.select_option("#model", "flux-1-canny-dev")
        expect(page.locator("#references-title")).to_have_text("Control image")
        # A photograph to edit does not become one by choosing another model.
        expect(page.locator("#reference-list li")).to_have_count(0)
        page.click("#generate")
        expect(page.locator("#references-need")).to_contain_text("needs a control image")
        expect(page.locator("#add-reference")).to_be_focused()
        assert painters.requests == []
        drop(page, {"edges.png": png(BLUE, (96, 64)), "more.png": png(RED)})
        expect(page.locator("#notice")).to_contain_text("This model takes 1 control image")
        expect(page.locator("#references-need")).to_have_text("")
        expect(page.get_by_role("button", name="Remove: control image")).to_be_visible()
        page.fill("#seed", "12")
        generated(page)
        [request] = painters.requests
        assert request.follows_reference
        assert [first_pixel(each) for each in request.references] == [BLUE]
        assert (request.width, request.height) == (96, 64)
        curl, code = copied(page, "#copy-request")
        assert 'control_image=@"edges.png"' in curl
        (tmp_path / "edges.png").write_bytes(png(BLUE, (96, 64)))
        env = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60)
        assert (tmp_path / "image-12.png").read_bytes() == png(color_of(12), (96, 64))
        assert painters.requests[1].references == request.references
        page.select_option("#model", "flux-1-dev")
        expect(page.get_by_role("button", name="Remove: reference 1")).to_be_visible()
        page.click('[data-name="recall"]')
        expect(page.locator("#references-title")).to_have_text("Control image")
        expect(page.get_by_alt_text("control image: edges.png")).to_be_visible()


def test_a_required_mask_is_asked_for_on_a_dark_phone(browser, heeding, painters):
    narrow = {"width": 360, "height": 740}
    with page_of(browser, viewport=narrow, color_scheme="dark") as page:
        opened(page, heeding)
        page.select_option("#model", "flux-3-klein-base")
        page.click("#more summary")
        page.fill("#negative", "people")
        expect(page.locator("#negative-hint")).to_contain_text("guidance")
        expect(page.locator("#scale-field")).to_be_hidden()
        expect(page.locator("#upsampling")).to_be_checked()
        page.uncheck("#upsampling")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.fill("#width", "64")
        page.fill("#height", "64")
        generated(page)
        assert painters.requests[0].negative_prompt == "people"
        expect(page.locator(".warning")).to_have_count(0)
        page.select_option("#model", "flux-1-fill-dev")
        expect(page.locator("#references-need")).to_have_text(
            "This model needs an image, and a mask of the part to generate."
        )
        page.click("#generate")
        expect(page.locator("#add-reference")).to_be_focused()
        drop(page, {"red.png": png(RED)})
        expect(page.locator("#references-need")).to_contain_text("paint the part")
        assert unnamed_in(page) == []
        page.get_by_role("button", name="Remove: reference 1").click()
        # A transparent part is a mask where one is required.
        erased = np.full((64, 64, 4), 255, np.uint8)
        erased[:32, :, 3] = 0
        drop(page, {"erased.png": as_png(erased)})
        expect(page.locator("#references-need")).to_have_text("")
        generated(page)
        assert marks_of(painters.requests[1])[:32].all()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
