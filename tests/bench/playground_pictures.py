"""Make the pictures of the playground in docs/: a browser uses what `make serve` started.

`make bench NAME=playground_pictures` in another shell writes them anew, with images that `tiny`
generates there and then. Look at them before you commit them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Browser, Page

from tests.gateway.playground.browser import chromium, done, generated, opened, page_of, stroke

DOCS = Path(__file__).parents[2] / "docs"
# Prompts of the world of `tiny`, with seeds that show it well.
PROMPTS = (
    ("a yellow cross on a purple background", 3),
    ("a small green ring in the top left corner on a white background", 5),
    ("a blue triangle on an orange background", 2),
    ("a red square left of a small blue circle on a white background", 11),
    ("a red circle on a blue background", 7),
)
EDIT = "change the background to orange"


def ask(page: Page, prompt: str, seed: int) -> None:
    """Generate an image."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.locator("h1").click()
    generated(page)


def picture_results(browser: Browser, address: str, folder: Path) -> None:
    """Show results of `tiny`, and an edit beside what it was made from."""
    with page_of(browser) as page:
        opened(page, address)
        for prompt, seed in PROMPTS:
            ask(page, prompt, seed)
        page.click('[data-name="reference"]')
        ask(page, EDIT, 7)
        page.click('[data-name="compare"]')
        page.locator("h1").click()
        page.screenshot(path=folder / "playground.png")


def picture_mask(browser: Browser, address: str, folder: Path) -> None:
    """Show a mask that is painted, in the dark."""
    with page_of(browser, color_scheme="dark") as page:
        opened(page, address)
        ask(page, *PROMPTS[-1])
        page.click('[data-name="reference"]')
        page.click(".mask-button")
        for down in (0.42, 0.5, 0.58):
            stroke(page, (0.35, down), (0.65, down))
        page.screenshot(path=folder / "playground-mask.png")
        page.click("#mask-done")
        ask(page, "make the circle green", 7)
        page.screenshot(path=folder / "playground-dark.png")


def picture_phone(browser: Browser, address: str, folder: Path) -> None:
    """Show the page on a phone, from its top and with an image."""
    with page_of(browser, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        opened(page, address)
        page.screenshot(path=folder / "playground-phone.png")
        page.click("#generate")
        done(page)
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "playground-phone-image.png")


def picture_docs(browser: Browser, address: str, folder: Path) -> None:
    """Show the description of the API."""
    with page_of(browser) as page:
        page.goto(f"{address}/docs")
        page.wait_for_selector(".route")
        page.screenshot(path=folder / "api-docs.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--folder", type=Path, default=DOCS)
    args = parser.parse_args()
    with chromium() as browser:
        for picture in (picture_results, picture_mask, picture_phone, picture_docs):
            picture(browser, args.url, args.folder)
    for path in sorted([*args.folder.glob("playground*.png"), args.folder / "api-docs.png"]):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
