"""A real browser in front of a gateway whose replicas are fakes, without a Ray."""

import asyncio
import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, FilePayload, Page, expect, sync_playwright

from flux_ray.request import (
    GeneratedImage,
    ImageRequest,
    ImageResult,
    OnEvent,
    Preview,
    Progress,
    QueuePosition,
    StageTimes,
)
from flux_ray.router.ledger.messages import SubmitRequest
from tests.conftest import FakeHandles, FakeTurns

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# How long to wait for what must come, on a machine that is busy.
PATIENCE_MS = 60_000
FIRST = (1280, 860)
expect.set_options(timeout=PATIENCE_MS)


def png(color: tuple[int, int, int], size: tuple[int, int] = (128, 128)) -> bytes:
    """Return an image file of one colour, which a browser can show."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def color_of(seed: int) -> tuple[int, int, int]:
    """Return the colour of the images of a seed."""
    return seed % 256, seed // 256 % 256, 128


async def passed(gate: threading.Event) -> None:
    """Wait for a gate that the test opens, which runs in another thread."""
    while True:
        if gate.is_set():
            return
        await asyncio.sleep(0.01)


def as_file(data: bytes, name: str = "image.png") -> list[FilePayload]:
    """Return an image as a file that is chosen in a page."""
    return [{"name": name, "mimeType": "image/png", "buffer": data}]


class PaintingHandles(FakeHandles):
    """Replicas that paint images which browsers can show, once the test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.num_cancelled = 0
        self.deployed = {"tiny", "tiny-tp2"}

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None, run: str = ""
    ) -> ImageResult:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)
        size = request.output_size
        for number in range(request.num_previews if on_event else 0):
            preview = GeneratedImage(png((90, 90, 90 + number), size), request.seed)
            on_event(Progress(number + 1, 4))
            on_event(Preview(request.tier, preview, number))
        try:
            await passed(self.may_finish)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        images = tuple(GeneratedImage(png(color_of(seed), size), seed) for seed in request.seeds)
        times = StageTimes(queue_s=0.001, encode_s=0.1, denoise_s=0.2, decode_s=0.1)
        return ImageResult(request.request_id, request.tier, images, times)


class QueueingTurns(FakeTurns):
    """A ledger that lets requests wait in the third place until the test lets them go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_start = threading.Event()
        self.may_start.set()

    async def take(
        self, offer: SubmitRequest, on_event: OnEvent | None = None, quota: object = None
    ) -> str:
        replica = await super().take(offer, on_event, quota)
        if not self.may_start.is_set() and on_event is not None:
            on_event(QueuePosition(3, 12.0))
        await passed(self.may_start)
        return replica


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of this machine; yield its URL."""
    settings = uvicorn.Config(api, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    end_s = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser that is installed; skip the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watch:
    """What a page complained of. A refusal that the gateway meant is no complaint."""

    def __init__(self, page: Page) -> None:
        self.complaints: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._check)
        self.origin: str | None = None

    def _note(self, message: ConsoleMessage) -> None:
        is_refusal = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not is_refusal:
            self.complaints.append(message.text)

    def _check(self, request: object) -> None:
        url: str = request.url  # type: ignore[attr-defined]
        if not url.startswith(("data:", "blob:")):
            origin = "/".join(url.split("/", 3)[:3])
            self.origin = self.origin or origin
            if origin != self.origin:
                self.complaints.append(f"{url} is of another host")


@contextmanager
def page_of(browser: Browser, **options: object) -> Iterator[Page]:
    """Open a page of a new visitor; at the end, nothing may have gone wrong in it."""
    width, height = FIRST
    options = {"viewport": {"width": width, "height": height}, "accept_downloads": True} | options
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    watch = Watch(page)
    yield page
    context.close()
    assert watch.complaints == []


def opened(page: Page, address: str) -> Page:
    """Open the playground, and wait until it knows its models."""
    page.goto(f"{address}/")
    page.wait_for_selector("#generate:enabled")
    return page


def generated(page: Page) -> None:
    """Press the button, and wait for the images."""
    # Until the mask is drawn to be sent, the page still shows that the last request is done.
    with page.expect_request("**/v1/images/*"):
        page.click("#generate")
    done(page)


def done(page: Page) -> None:
    """Wait until no request runs and the image that is shown is whole."""
    page.wait_for_selector("#generate:not(.busy)")
    page.wait_for_selector('.frame[data-state="done"]')


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drop files onto the page."""
    sent = {name: list(data) for name, data in files.items()}
    page.evaluate(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of Object.entries(files)) {
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            }
            const event = {dataTransfer: transfer, bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent("dragover", event));
            document.body.dispatchEvent(new DragEvent("drop", event));
        }""",
        sent,
    )


def paste(page: Page, data: bytes) -> None:
    """Paste an image, as from a screenshot."""
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "", {type: "image/png"}));
            const event = {clipboardData: transfer, bubbles: true, cancelable: true};
            document.dispatchEvent(new ClipboardEvent("paste", event));
        }""",
        list(data),
    )


def stroke(page: Page, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a line with the mouse on the mask; places are shares of its width and height."""
    # The dialog opens only when the browser has decoded the image.
    page.wait_for_selector("#mask-canvas")
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    (x, y), (to_x, to_y) = (
        (box["x"] + right * box["width"], box["y"] + down * box["height"])
        for right, down in (begin, end)
    )
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=5)
    page.mouse.up()


def downloaded(page: Page) -> Path:
    """Download the image that is shown; return the file, under the name that the page chose."""
    with page.expect_download() as coming:
        page.click('[data-name="download"]')
    path = Path(coming.value.path())
    return path.rename(path.with_name(coming.value.suggested_filename))
