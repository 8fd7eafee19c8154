"""What people do first, in a real browser: generate, wait, cancel, keep a seed, look again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from flux_ray.errors import Overloaded
from tests.gateway.playground.browser import (
    color_of,
    done,
    downloaded,
    generated,
    opened,
    png,
    wait_until,
)

EXAMPLE = "a red circle on a blue background"


def facts(page: Page) -> dict[str, str]:
    names = page.locator(".facts dt").all_inner_texts()
    return dict(zip(names, page.locator(".facts dd").all_inner_texts(), strict=True))


def test_a_newcomer_presses_one_button(page, painters):
    expect(page.locator("#prompt")).to_have_value(EXAMPLE)
    seed = page.input_value("#seed")
    generated(page)
    [request] = painters.requests
    assert (request.prompt, str(request.seed), request.tier) == (EXAMPLE, seed, "tiny")
    shown = facts(page)
    assert (shown["Seed"], shown["Model"]) == (seed, "tiny")
    assert shown["GPU"] == "0.40 s"
    expect(page.locator("#status")).to_contain_text("The image is done")
    file = downloaded(page)
    assert file.name == f"tiny-a-red-circle-on-a-blue-background-{seed}.png"
    assert file.read_bytes() == png(color_of(int(seed)))


def test_waiting_is_told_and_previews_are_shown(page, painters, queue):
    queue.may_start.clear()
    painters.may_finish.clear()
    page.click("#generate")
    expect(page.locator(".standing")).to_have_text("3 ahead in the queue, about 12 s")
    expect(page.locator("#status")).to_have_text("3 ahead in the queue, about 12 s")
    queue.may_start.set()
    expect(page.locator(".frame img.preview")).to_be_visible()
    expect(page.locator(".standing")).to_have_text("Generating 67 %")
    assert page.locator("progress").get_attribute("value") is not None
    assert painters.requests[0].num_previews == 2
    painters.may_finish.set()
    done(page)
    expect(page.locator(".frame img.preview")).to_have_count(0)


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_cancelling_ends_the_request_in_the_replica(page, painters, how):
    painters.may_finish.clear()
    before = painters.num_cancelled
    page.click("#generate")
    expect(page.locator("#generate")).to_contain_text("Cancel")
    wait_until(lambda: painters.requests)
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#generate")
    expect(page.locator(".told")).to_have_text("Cancelled")
    wait_until(lambda: painters.num_cancelled == before + 1)
    painters.may_finish.set()
    generated(page)


def test_a_seed_is_new_each_time_until_it_is_kept(page, painters):
    generated(page)
    generated(page)
    page.click("#lock")
    generated(page)
    page.fill("#seed", "7")
    generated(page)
    first, second, kept, typed = (request.seed for request in painters.requests)
    assert first != second == kept
    assert typed == 7
    # The oldest one is the last in the strip; its seed is recalled and kept.
    page.locator(".tile").last.click()
    page.click('[data-name="seed"]')
    expect(page.locator("#seed")).to_have_value(str(first))
    expect(page.locator("#lock")).to_have_attribute("aria-pressed", "true")
    page.click("#dice")
    assert page.input_value("#seed") != str(first)


def test_all_images_of_a_session_stay_and_two_are_compared(page, painters):
    page.fill("#n", "3")
    page.fill("#seed", "100")
    generated(page)
    page.fill("#prompt", "a ring")
    page.fill("#n", "1")
    page.fill("#seed", "200")
    generated(page)
    expect(page.locator(".tile")).to_have_count(4)
    assert [request.num_images for request in painters.requests] == [3, 1]
    page.click('[data-name="compare"]')
    expect(page.locator(".label.left")).to_have_text("Seed 100")
    page.locator(".tile").nth(2).click()
    expect(page.locator(".label.left")).to_have_text("Seed 101")
    expect(page.locator(".label.right")).to_have_text("Seed 200")
    page.locator(".comparing input").press("ArrowRight")
    assert "inset(0px 49% 0px 0px)" in page.locator(".before").get_attribute("style")
    page.keyboard.press("Escape")
    expect(page.locator(".comparing")).to_have_count(0)
    page.locator(".tile").nth(1).click()
    page.click('[data-name="recall"]')
    expect(page.locator("#prompt")).to_have_value(EXAMPLE)
    expect(page.locator("#seed")).to_have_value("100")
    page.click('[data-name="remove"]')
    expect(page.locator(".tile")).to_have_count(3)


def test_sizes_are_those_of_the_model(page, painters):
    page.locator(".presets label", has_text="16:9").click()
    assert (page.input_value("#width"), page.input_value("#height")) == ("176", "96")
    page.click("#swap")
    generated(page)
    page.fill("#width", "100")
    expect(page.locator("#size-error")).to_have_text("Each side is a multiple of 16.")
    page.click("#generate")
    page.fill("#width", "64")
    page.fill("#height", "192")
    generated(page)
    sizes = [(request.width, request.height) for request in painters.requests]
    assert sizes == [(96, 176), (64, 192)]


def test_what_a_model_cannot_do_is_not_shown(page, painters):
    options = page.locator("#model option").all_inner_texts()
    assert options == ["tiny", "tiny-tp2", "flux-2-dev (not deployed)", "studio"]
    page.click("#more summary")
    expect(page.locator("#guidance-field")).to_be_hidden()
    page.select_option("#model", "flux-2-dev")
    expect(page.locator("#guidance-field")).to_be_visible()
    expect(page.locator("#model-note")).to_contain_text("Not deployed")
    expect(page.locator("#steps")).to_have_value("50")
    expect(page.locator("#width")).to_have_value("1024")
    page.click("#generate")
    expect(page.locator(".told h3")).to_have_text("Not available right now")
    page.select_option("#model", "studio")
    expect(page.locator("#model-note")).to_contain_text("served by tiny-tp2 or tiny")
    page.locator("#steps").fill("7")
    generated(page)
    assert (painters.requests[-1].tier, painters.requests[-1].num_steps) == ("tiny-tp2", 7)
    assert facts(page)["Model"] == "tiny-tp2"


def test_a_refusal_is_told_in_words_and_counted_down(page, painters, queue):
    painters.failures.append(Overloaded("the queue is full", retry_after_s=2))
    page.click("#generate")
    expect(page.locator(".told h3")).to_have_text("Too busy right now")
    expect(page.locator(".told")).to_contain_text("The queue is full.")
    again = page.locator('[data-name="again"]')
    expect(page.locator(".wait")).to_contain_text("Trying again makes sense in")
    expect(again).to_be_disabled()
    expect(again).to_be_enabled()
    again.click()
    done(page)
    first, second = painters.requests
    assert first.seed == second.seed


def test_settings_are_there_again_and_nothing_else(page, address):
    page.fill("#prompt", "a green ring")
    page.fill("#seed", "41")
    page.fill("#n", "2")
    generated(page)
    opened(page, address)
    expect(page.locator("#prompt")).to_have_value("a green ring")
    expect(page.locator("#seed")).to_have_value("41")
    expect(page.locator("#n")).to_have_value("2")
    expect(page.locator(".tile")).to_have_count(0)
    stored = json.loads(page.evaluate("localStorage.getItem('flux-ray')"))
    assert stored["prompt"] == "a green ring"
    assert page.evaluate("Object.keys(localStorage)") == ["flux-ray"]
    assert len(json.dumps(stored)) < 1000


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_copied_code_generates_the_same_image(page, painters, tmp_path, language):
    page.fill("#prompt", """it's "a ring", $HOME""")
    page.fill("#seed", "12")
    page.fill("#n", "2")
    page.click("#copy-request")
    page.get_by_role("tab", name=language).click()
    code = page.inner_text("#code")
    # Chromium and a proxy for the outside must not meet: this is asked for on this machine.
    env = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    subprocess.run(command, cwd=tmp_path, env=env | {"PATH": path}, check=True, timeout=60)
    assert {each.name for each in tmp_path.iterdir()} == {"image-12.png", "image-13.png"}
    assert (tmp_path / "image-13.png").read_bytes() == png(color_of(13))
    assert painters.requests[-1].prompt == """it's "a ring", $HOME"""


def test_every_route_is_in_the_docs(page, address, painters):
    page.goto(f"{address}/docs")
    page.wait_for_selector(".route")
    described = page.request.get(f"{address}/openapi.json").json()["paths"]
    shown = page.locator(".route h3 code").all_inner_texts()
    assert sorted(shown) == sorted(path for path, each in described.items() for _ in each)
    text = page.locator(".route", has_text="/v1/images/edits").inner_text()
    assert re.search(r"prompt required", text)
    assert "num_inference_steps" in text
    assert "-F 'image=@image.png'" in text
