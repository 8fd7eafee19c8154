"""The body of an answer: images put into it as bytes make the JSON that pydantic would write."""

import base64
import json

from flux_ray.gateway.openai.answer import Answer, AnsweredImage, answer_for
from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, StageTimes

REQUEST = ImageRequest("image-1", "tiny", "a circle", 128, 64, 4, 1.0, 7, num_images=2)
# What a client could have said of an image, to be taken for its place.
WARNINGS = ['no such field: "b64_json":""', '"b64_json":""']


def result_of(*files: bytes) -> ImageResult:
    images = tuple(GeneratedImage(data, 7 + number) for number, data in enumerate(files))
    return ImageResult("image-1", "tiny", images, StageTimes(0.0, 0.1, 0.2, 0.3))


def test_images_are_where_the_json_says() -> None:
    files = bytes(range(256)), b""
    answer = answer_for(REQUEST, result_of(*files), WARNINGS, 0.0)
    said = Answer.model_validate_json(answer.body)
    assert [base64.b64decode(each.b64_json or "") for each in said.data] == list(files)
    assert [each.seed for each in said.data] == [7, 8]
    assert said.warnings == WARNINGS
    assert json.loads(answer.body) == said.model_dump(exclude_none=True)


def test_the_body_is_byte_for_byte_what_pydantic_writes() -> None:
    result = result_of(b"one", b"two")
    body = bytes(answer_for(REQUEST, result, WARNINGS, 0.0).body)
    said = Answer.model_validate_json(body)
    assert body == said.model_dump_json(exclude_none=True).encode()


def test_answers_by_url_have_no_base64() -> None:
    answer = answer_for(REQUEST, result_of(b"one"), [], 0.0, ("http://here/1",))
    assert Answer.model_validate_json(answer.body).data == [
        AnsweredImage(url="http://here/1", seed=7)
    ]
    assert b"b64_json" not in answer.body
