"""docs/commands.md says what the commands take, and their help says it too."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from flux_ray.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def commands_in(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, each in inner.items():
        yield from commands_in(each, f"{name} {word}")


COMMANDS = dict(commands_in(typer.main.get_command(app), "flux-ray"))
# Of all pages, as a group of commands may have one of its own.
SECTIONS = {
    heading: text
    for page in sorted(DOCS.glob("*.md"))
    for heading, text in re.findall(
        r"^## (flux-ray .+?)\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S
    )
}


def options_of(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_every_command_has_its_section() -> None:
    assert SECTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_a_section_are_the_commands_own(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", SECTIONS[name], flags=re.M | re.S)
    # In a table only the first column is about this command's own options.
    named = "\n".join(re.findall(r"^\| (`-.*?) \|", text, re.M)) or text
    assert set(re.findall(r"`(--?[a-z][a-z-]*)`", named)) == options_of(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_section_can_be_typed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that an example reads are made empty beside those of the repository."""
    (tmp_path / "serve").symlink_to(ROOT / "serve")
    for file in ("circle.png", "mask.png", "edges.png", "house.jpg", "traces"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^flux-ray .+", SECTIONS[name], re.M)
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        own = name.split()
        assert words[: len(own)] == own
        with COMMANDS[name].make_context(name, words[len(own) :]) as context:
            assert context.params is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_says_how_it_ends(name: str) -> None:
    assert re.search(r"\bStatus 0\b", SECTIONS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_exit_status(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split()[1:], "--help"])
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "Exit status: 0" in said
    assert f"Example: {name}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_is_explained(name: str) -> None:
    parameters = [each for each in COMMANDS[name].params if each.name != "help"]
    assert [each.name for each in parameters if not getattr(each, "help", None)] == []


def test_without_a_command_the_help_is_shown() -> None:
    result = CliRunner().invoke(app, [])
    assert "Usage:" in result.output
    assert all(name.split()[1] in result.output for name in COMMANDS)
