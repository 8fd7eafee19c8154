"""What a deployment changes, and why it failed, from a config and Serve's details."""

import pytest

from flux_ray.cli.deployment import Change, cause_of, changes, differing, fixed_options


def test_changes_are_found_by_key() -> None:
    before = {"a": 1, "runtime_env": {"env_vars": {"X": "<redacted>"}}, "b": {"c": [1]}, "e": {}}
    after = {"a": 2, "runtime_env": {"env_vars": {"X": "1"}}, "b": {"c": [2]}, "f": None}
    assert list(differing(before, after)) == ["a", "b.c"]
    running = {"applications": {"old": {"status": "RUNNING"}, "gone": {"status": "DELETING"}}}
    wanted = {"applications": [{"name": "new"}]}
    assert changes(wanted, running) == [Change("new", "new"), Change("old", "removed")]


def test_the_files_logging_config_is_each_applications() -> None:
    logging = {"encoding": "JSON"}
    noted = {"name": "a", "logging_config": logging}
    running = {"applications": {"a": {"status": "RUNNING", "deployed_app_config": noted}}}
    wanted = {"logging_config": logging, "applications": [{"name": "a"}]}
    assert changes(wanted, running) == [Change("a", "unchanged")]
    assert list(fixed_options({"http_options": {"port": 1}}, running)) == []


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("", ""),
        ("Deployment 'a' has 1 replicas that\nmay be slow", "Deployment 'a' has 1 replicas that"),
        (
            "The deployment failed to start 3 times in a row.\nTraceback (most recent call last):\n"
            "  File x\nray.exceptions.RayTaskError(ValueError): ray::f()\n"
            "ValueError: lora a is not a file",
            "ValueError: lora a is not a file",
        ),
        (
            "x\ntorch.cuda.OutOfMemoryError: CUDA out of memory",
            "OutOfMemoryError: CUDA out of memory",
        ),
    ],
)
def test_the_cause_is_taken_out_of_serves_words(message: str, cause: str) -> None:
    assert cause_of(message) == cause
