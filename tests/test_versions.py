"""Code of this version and of the next one, each in a process of its own, understand each other."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flux_ray.errors import ProtocolMismatch
from flux_ray.request import (
    PROTOCOL,
    Encoding,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    RgbImage,
    StageTimes,
)
from flux_ray.wire import pack_answer, pack_request, request_from
from tests.newer_code import SHARP, VERSION, save_newer_code

ROOT = Path(__file__).parent.parent
PLAIN = ImageRequest(
    *("id", "tiny", "a ring", 128, 96, 4, 1.0),
    seed=7,
    references=(RgbImage(1, 1, b"abc"),),
    encoding=Encoding("webp"),
)
RESULT = ImageResult("id", "tiny", (GeneratedImage(b"png", 7),), StageTimes(0.1, 0.2, 0.3, 0.4))
# What the next version does with what it is sent, as it answers.
NEWER = """
import pickle, sys
from dataclasses import replace
import flux_ray
from flux_ray import errors, wire
from flux_ray.request import PROTOCOL, ImageRequest

sent = pickle.load(sys.stdin.buffer)
told = flux_ray.__version__, PROTOCOL
asked = wire.request_from(sent["call"])
result = wire.answer_from(sent["answer"])
sharp = replace(asked, prompt="a ring, {sharp}")
calls = wire.pack_request(asked), wire.pack_request(sharp)
says = told, asked.sharpness, *calls, result.images[0].data
errors.TooSharp = type("TooSharp", (errors.Overloaded,), dict(__module__="flux_ray.errors"))
pickle.dump((*says, errors.TooSharp("later", None, 3)), sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """`next_version(sent)`: what it says to that."""
    folder = tmp_path_factory.mktemp("newer")
    save_newer_code(folder)

    def ask(sent: Any) -> Any:
        answer = subprocess.run(
            [sys.executable, "-c", NEWER.format(sharp=SHARP)],
            input=pickle.dumps(sent),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            check=True,
        )
        return pickle.loads(answer.stdout)

    return ask


def test_this_version_and_the_next_one_understand_each_other(
    next_version: Callable[[Any], Any],
) -> None:
    told, sharpness, plain, sharp, image, error = next_version(
        {"call": pack_request(PLAIN), "answer": pack_answer(RESULT)}
    )
    assert told == (VERSION, PROTOCOL + 1)
    assert (sharpness, image) == (0.0, b"png"), "what we do not know of has its default there"
    assert plain["protocol"] == PROTOCOL + 1
    assert request_from(plain) == PLAIN, "what it says by default is nothing new"
    with pytest.raises(ProtocolMismatch, match="sharpness"):
        request_from(sharp)
    assert (type(error).__name__, error.retry_after_s) == ("Overloaded", 3)
