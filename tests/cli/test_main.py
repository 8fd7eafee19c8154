"""`flux-ray` against a real local HTTP server whose replicas are fakes."""

import socket
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flux_ray
from flux_ray.cli.main import app
from flux_ray.errors import TierUnavailable


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_image(url, handles, tmp_path):
    output = tmp_path / "new" / "out.png"
    arguments = ("--tier", "tiny", "--size", "96x64", "--steps", 2, "--seed", 7)
    result = invoke("generate", "a red circle", "-o", output, "--url", url, *arguments)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == b"image 7"
    assert result.stdout.startswith(f"{output}  seed 7  ")
    [request] = handles.requests
    assert (request.prompt, request.width, request.height) == ("a red circle", 96, 64)
    assert (request.num_steps, request.encoding.format) == (2, "png")


def test_several_images(url, tmp_path):
    output = tmp_path / "out.jpg"
    result = invoke("generate", "a ring", "-o", output, "-n", 2, "--seed", 5, "--url", url)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out-0.jpg").read_bytes() == b"image 5"
    assert (tmp_path / "out-1.jpg").read_bytes() == b"image 6"
    assert not output.exists()


def test_no_file_is_overwritten_unless_that_is_said(url, handles, tmp_path):
    output, second = tmp_path / "out.png", tmp_path / "out-1.png"
    for path in (output, second):
        path.write_bytes(b"mine")
    for arguments, taken in ((), output), (("-n", 2), second):
        result = invoke("generate", "a ring", "-o", output, "--url", url, *arguments)
        assert result.exit_code == 1
        assert f"there is already {taken}: " in result.stderr
    assert (handles.requests, output.read_bytes(), second.read_bytes()) == ([], b"mine", b"mine")
    result = invoke("generate", "a ring", "-o", output, "--seed", 7, "--url", url, "--force")
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == b"image 7"


def test_an_edit(url, handles, make_image, tmp_path):
    paths = []
    for color in ("red", "blue"):
        paths.append(tmp_path / f"{color}.png")
        paths[-1].write_bytes(make_image(color=color))
    images = ("--image", paths[0], "--image", paths[1])
    result = invoke("generate", "both", "-o", tmp_path / "out.webp", *images, "--url", url)
    assert result.exit_code == 0, result.output
    [request] = handles.requests
    assert [reference.rgb[:3] for reference in request.references] == [b"\xff\0\0", b"\0\0\xff"]
    assert request.encoding.format == "webp"


def test_the_servers_words_are_shown(url, tmp_path):
    output = tmp_path / "out.png"
    result = invoke("generate", "a ring", "-o", output, "--tier", "[red]", "--url", url)
    assert result.exit_code == 1
    assert "no model '[red]' is served here" in result.stderr
    assert not output.exists()


def test_a_failure_of_the_server_is_shown_with_its_id(url, handles):
    handles.failures = [TierUnavailable("tiny cannot serve now")]
    result = invoke("generate", "a ring", "--url", url)
    assert result.exit_code == 1
    assert "tiny cannot serve now (request " in result.stderr


def test_an_id_is_shown_once(url, handles):
    handles.failures = [RuntimeError("ours")]
    result = invoke("generate", "a ring", "--url", url)
    assert result.exit_code == 1
    assert result.stderr.count("request ") == 1
    assert "ours" not in result.stderr


def test_nothing_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = invoke("generate", "a ring", "--url", url)
    assert result.exit_code == 1
    assert f"nothing answers at {url}" in result.stderr


@pytest.mark.parametrize("url", ["nowhere", "http://", "ftp://127.0.0.1"])
def test_addresses_that_are_none(url):
    result = invoke("tiers", "--url", url)
    assert result.exit_code == 1
    assert "error:" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("a ring", "-o", "out.gif"),
        ("a ring", "-o", "out"),
        ("a ring", "--image", "no/such/file.png"),
        ("a ring", "-n", "0"),
        (),
    ],
)
def test_wrong_arguments(arguments):
    assert invoke("generate", *arguments).exit_code == 2


def test_something_else_answers(url):
    result = invoke("tiers", "--url", f"{url}/openapi.json?")
    assert result.exit_code == 1
    assert "not as a flux-ray gateway does" in result.stderr


def test_tiers(url):
    result = invoke("tiers", "--url", url)
    assert result.exit_code == 0, result.output
    assert "tiny" in result.stdout
    assert "apache-2.0" in result.stdout


def test_version():
    for word in ("version", "--version"):
        result = invoke(word)
        assert (result.exit_code, result.stdout) == (0, f"{flux_ray.__version__}\n")


def test_the_command_is_installed_as_flux_ray():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    target = project["project"]["scripts"]["flux-ray"]
    assert EntryPoint("flux-ray", target, "console_scripts").load() is app
