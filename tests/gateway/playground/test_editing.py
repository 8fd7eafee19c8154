"""References, masks, keys, colours, small screens and the keyboard, in a real browser."""

import io
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from tests.conftest import LIMITS
from tests.gateway.playground.browser import (
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
    # Everything that can be used has a name for those who do not see it.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter(each => !(each.getAttribute("aria-label") || each.labels?.length
                || each.textContent.trim()))
            .map(each => each.outerHTML)"""
    )
    assert unnamed == []
