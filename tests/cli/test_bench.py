"""`flux-ray bench`: an open loop whose latencies no stalled server can hide."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from flux_ray.cli.load import (
    OpenLoop,
    PlannedRequest,
    SentRequest,
    arrivals,
    from_trace,
    quantile,
    summary_of,
)
from flux_ray.cli.main import app
from flux_ray.router.trace import TracedRequest


def planned(at_s: float, **fields: Any) -> PlannedRequest:
    return PlannedRequest(at_s, {"prompt": "a ring", "n": 1} | fields)


def image_answer(num_images: int = 1) -> httpx.Response:
    return httpx.Response(200, json={"data": [{"b64_json": "eA=="}] * num_images})


async def send(
    handler: Any, requests: list[PlannedRequest], num_at_once: int = 100
) -> list[SentRequest]:
    transport = httpx.MockTransport(handler)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await OpenLoop(client, num_at_once).run(requests)


async def test_a_stalled_server_does_not_slow_the_arrivals_down() -> None:
    """Five are due within 40 ms; each takes 100 ms, and all are sent when they are due."""
    times: list[float] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        times.append(time.monotonic())
        await asyncio.sleep(0.1)
        return image_answer()

    sent = await send(answer, [planned(0.01 * number) for number in range(5)])
    assert [each.outcome for each in sent] == ["ok"] * 5
    assert times[-1] - times[0] < 0.1
    assert all(each.latency_s >= 0.1 for each in sent)


async def test_latency_counts_from_when_a_request_was_due() -> None:
    """One at a time: the second waits for the first, and that is not hidden."""

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.1)
        return image_answer()

    _, second = await send(answer, [planned(0.0), planned(0.0)], num_at_once=1)
    assert second.due_s == 0.0
    assert second.latency_s >= 0.2
    assert second.sent_s >= 0.1


async def test_every_end_has_a_name() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["prompt"]
        if prompt == "lost":
            raise httpx.ReadTimeout("too late")
        answers = {"busy": httpx.Response(429), "none": image_answer(0), "two": image_answer(2)}
        return answers.get(prompt, httpx.Response(200, text="no JSON"))

    requests = [planned(0, prompt=prompt) for prompt in ("lost", "busy", "none", "text")]
    sent = await send(answer, [*requests, planned(0, prompt="two", n=2)])
    outcomes = [each.outcome for each in sent]
    assert outcomes == ["ReadTimeout", "429", "images missing", "images missing", "ok"]
    assert summary_of(sent).num_images == 2


async def test_deadlines_and_references_go_with_the_request() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return image_answer()

    requests = [
        PlannedRequest(0, {"prompt": "a", "n": 1}, deadline_s=2.5, num_references=2),
        planned(0),
    ]
    await send(answer, requests)
    edit, plain = sorted(seen, key=lambda request: request.url.path)
    assert (edit.url.path, plain.url.path) == ("/v1/images/edits", "/v1/images/generations")
    assert edit.headers["x-flux-deadline-s"] == "2.5"
    assert edit.content.count(b'name="image[]"') == 2
    assert "x-flux-deadline-s" not in plain.headers


def ended(latency_s: float, outcome: str = "ok", deadline_s: float | None = None) -> SentRequest:
    return SentRequest(0.0, 0.0, latency_s, outcome, int(outcome == "ok"), deadline_s)


def test_the_summary() -> None:
    sent = [ended(number / 10) for number in range(1, 101)]
    summary = summary_of(
        [*sent, ended(0.1, "429", 1.0), ended(2.0, "ok", 1.0), ended(0.5, "ok", 1)]
    )
    assert (summary.num_sent, summary.num_ok, summary.num_images) == (103, 102, 102)
    assert summary.outcomes == {"ok": 102, "429": 1}
    assert (summary.num_with_deadline, summary.num_in_time) == (3, 1)
    assert summary.taken_s == 10.0
    assert summary.images_per_s == 10.2
    assert (summary.latency_s["p50"], summary.latency_s["max"]) == (4.9, 10.0)


@pytest.mark.parametrize(
    ("share", "value"), [(0.5, 10), (0.95, 19), (0.99, 20), (1.0, 20), (0.0, 1)]
)
def test_quantiles_are_values_that_were_measured(share: float, value: float) -> None:
    assert quantile(list(range(1, 21)), share) == value


def test_arrivals() -> None:
    assert arrivals(2, 2, "even", 0) == [0, 0.5, 1, 1.5]
    times = arrivals(50, 100, "poisson", 7)
    assert times == arrivals(50, 100, "poisson", 7) != arrivals(50, 100, "poisson", 8)
    assert times == sorted(times) and times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.06)


def test_a_trace_for_another_server() -> None:
    entry = TracedRequest(1.5, "tiny", 96, 64, 3, references=1, images=2, deadline_s=4.0)
    (own,) = from_trace([entry], ["a ring"], None, 5)
    assert own.fields == {
        "model": "tiny",
        "prompt": "a ring",
        "n": 2,
        "size": "96x64",
        "num_inference_steps": 3,
        "seed": 5,
    }
    assert (own.at_s, own.deadline_s, own.num_references) == (1.5, 4.0, 1)
    (other,) = from_trace([entry], ["a ring"], "peer/model", 5)
    assert other.fields["model"] == "peer/model"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


QUICK = ("--rate", 40, "--duration", 0.2, "--arrivals", "even")


def test_a_gateway_is_measured(url: str, handles: Any) -> None:
    result = invoke(url, *QUICK, "--size", "96x64", "--steps", 2, "--model", "tiny", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["num_sent"], report["num_ok"], report["outcomes"]) == (8, 8, {"ok": 8})
    assert report["latency_s"]["p50"] > 0
    assert {(each.width, each.height, each.num_steps) for each in handles.requests} == {(96, 64, 2)}
    assert sorted(each.seed for each in handles.requests) == list(range(8))


def test_the_table(url: str) -> None:
    result = invoke(url, *QUICK, "--deadline", 30)
    assert result.exit_code == 0, result.output
    assert "8 of 8" in result.stdout
    assert "ended: 8 ok" in result.stdout
    assert "p99" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_trace_from_a_file(url: str, handles: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at_s": 5, "tier": "tiny"}\n{"at_s": 5.1, "tier": "tiny", "steps": 2}\n')
    result = invoke(url, "--trace", trace, "--json")
    assert result.exit_code == 0, result.output
    assert [each.num_steps for each in handles.requests] == [4, 2]
    trace.write_text('{"at_s": 5, "tiers": "tiny"}\n')
    result = invoke(url, "--trace", trace)
    assert (result.exit_code, "line 1: unknown key 'tiers'" in result.stderr) == (1, True)


def test_no_request_is_answered(url: str) -> None:
    result = invoke(url, *QUICK, "--model", "none", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["latency_s"]["p50"] is None
    assert "no request was answered with images: 8 404" in result.stderr


def test_nothing_answers() -> None:
    result = invoke("http://127.0.0.1:9", *QUICK)
    assert result.exit_code == 1
    assert "8 ConnectError" in result.stderr


def test_an_address_that_is_none() -> None:
    result = invoke("nowhere", *QUICK)
    assert result.exit_code == 1
    assert "nowhere" in result.stderr or "UnsupportedProtocol" in result.stderr


def test_prompts_from_a_file(url: str, handles: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    assert invoke(url, *QUICK, "--prompts", prompts).exit_code == 0
    assert {each.prompt for each in handles.requests} == {"one", "two"}
    prompts.write_text("\n")
    assert invoke(url, *QUICK, "--prompts", prompts).exit_code == 1
