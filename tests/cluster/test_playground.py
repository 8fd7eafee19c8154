"""The playground in a real browser, with images of the real `tiny`: generate, then edit a part."""

from collections.abc import Callable

import numpy as np
from playwright.sync_api import expect

from tests.gateway.playground.browser import (
    chromium,
    done,
    downloaded,
    opened,
    page_of,
    stroke,
)

RED, BLUE, ORANGE = (220, 40, 40), (40, 80, 210), (240, 140, 30)


def is_near(pixel: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - color).max() < 70)


def test_an_image_is_generated_and_its_background_edited_under_a_mask(
    address: str, pixels_of: Callable[[bytes], np.ndarray]
) -> None:
    with chromium() as browser, page_of(browser) as page:
        opened(page, address)
        # The example that is there, as a newcomer would.
        page.fill("#seed", "7")
        page.click("#generate")
        done(page)
        generated = pixels_of(downloaded(page).read_bytes())
        assert is_near(generated[64, 64], RED)
        assert is_near(generated[4, 4], BLUE)
        page.click('[data-name="reference"]')
        page.click(".mask-button")
        page.locator("#brush").fill("20")
        stroke(page, (0.0, 0.04), (1.0, 0.04))
        page.click("#mask-done")
        page.fill("#prompt", "change the background to orange")
        page.click("#generate")
        expect(page.locator(".tile")).to_have_count(2)
        done(page)
        edited = pixels_of(downloaded(page).read_bytes())
    assert is_near(edited[4, 64], ORANGE)
    # Outside of the mask every pixel is as it was, although the words speak of all of it.
    assert (edited[24:] == generated[24:]).all()
