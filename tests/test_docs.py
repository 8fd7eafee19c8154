"""The pages in docs/ are true: links lead somewhere, commands exist, references match the code."""

import re
import runpy
from pathlib import Path

import pytest

from flux_ray.catalog import TIERS
from flux_ray.cli.main import app
from flux_ray.gateway.fields.foreign import CONTROLS, IMAGES, MASKS, SAME
from flux_ray.gateway.heeded import heeds

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))
MAX_LINE = 127


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.replace(" ", "-") for word in words}


def is_there(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    return path.exists() and (not anchor or anchor in anchors_of(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in inside if not is_there(page, target)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_can_be_read(page: Path) -> None:
    """A table's rows cannot be wrapped, nor a command or a link."""
    lines = page.read_text().splitlines()
    long = [line for line in lines if len(line) > MAX_LINE and not re.match(r"\s*[|!]|```", line)]
    assert [
        line for line in long if " " in line.strip() and "](" not in line and "`" not in line
    ] == []


def test_every_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {page.name for page in DOCS.glob("*.md") if f"(docs/{page.name}" not in readme} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    code = "\n".join(re.findall(r"```\w*\n.*?```|(?<=`)[^`\n]+(?=`)", page.read_text(), re.S))
    assert set(re.findall(r"^(?:\$ )?\S*flux-ray ([a-z][a-z-]*)", code, re.M)) <= commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", code, re.M)) <= targets


@pytest.mark.parametrize("name", ["configuration.md", "licences.md"])
def test_what_is_made_from_the_code_is_as_the_code_is(name: str) -> None:
    """`python docs/reference.py` writes them."""
    assert (DOCS / name).read_text() == REFERENCE["PAGES"][name]()


# The rows of the table in docs/api.md that lists all models that heed a field.
LISTED = ("negative_prompt", "true_cfg_scale", "strength", "control_image")


def heeded_by() -> dict[str, tuple[str, str]]:
    """Return the second and third column of the table of fields, by field."""
    text = (DOCS / "api.md").read_text()
    _, table = text.split("### Fields that only some models heed", 1)
    rows = re.findall(r"^\| `(\w+)`[^|]* \| ([^|]*) \| ([^|]*) \|$", table, re.M)
    return {field: (names, tiers) for field, names, tiers in rows}


def test_the_table_of_fields_names_the_models_that_heed_each() -> None:
    told, before = heeded_by(), ""
    for field in LISTED:
        _, tiers = told[field]
        if tiers.startswith("these, and"):
            tiers += before
        named, before = set(re.findall(r"`([\w-]+)`", tiers)), tiers
        # Until the rows of a field are there, the table is ahead of them.
        for tier in TIERS if any(heeds(tier, field) for tier in TIERS) else ():
            assert (tier.name in named) == heeds(tier, field), (field, tier.name)


def test_the_table_of_fields_has_names_that_are_read() -> None:
    for field, (names, _) in heeded_by().items():
        known = {*SAME.get(field, ()), "guidance_scale"} | IMAGES | MASKS | CONTROLS
        assert set(re.findall(r"`(\w+)`", names)) <= known
