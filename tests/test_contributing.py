"""CONTRIBUTING.md and README's life of a request are true, and the lists leave nothing out."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import flux_ray
from flux_ray import metrics
from flux_ray.catalog.flops import WORKLOADS
from flux_ray.catalog.tiers import TIERS
from flux_ray.gateway.errors import Dialect
from flux_ray.metrics import Metric

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = sorted((ROOT / "flux_ray").rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
DEPLOYMENT = [
    path
    for folder in ("serve", "cluster")
    for path in sorted((ROOT / folder).rglob("*"))
    # A link is what it leads to, and that is listed.
    if path.is_file()
    and not path.is_symlink()
    and path.suffix in (".yaml", ".yml", ".json", ".cfg", ".md", ".sh")
]
TIER_NAMES = {tier.name for tier in TIERS}
# Tiers whose weights an operator brings: those of the published models.
PUBLISHED = {tier.name for tier in TIERS if tier.weights is None}
FAMILIES = {tier.family for tier in TIERS}
FAMILY_FOLDERS = [path.parent for path in (ROOT / "flux_ray/engine").glob("*/__init__.py")]
DIALECT_MODULES = ("openai", "bfl", "huggingface")
# Where a path of each dialect begins, in tests of routes.
DIALECT_PATHS = {
    "openai": re.compile("/v1/images/"),
    "bfl": re.compile("/v1/(get_result|tiny)|/proxy/bfl/"),
    "hugging_face": re.compile("/models/"),
}
ROWS = {name: row for name, row in vars(metrics).items() if isinstance(row, Metric)}


def paths_in(text: str) -> set[str]:
    """Return what stands in backticks and looks like a path of the repository."""
    words = re.findall(r"`([^`\s]+)`", text)
    top = {path.name for path in ROOT.iterdir()}
    named = {word for word in words if re.fullmatch(r"[\w./-]+", word)}
    looks_like_one = re.compile(r"[^/].*/|.*\.(py|md|toml|yaml)$")
    return {word for word in named if word in top or looks_like_one.match(word)}


def section(title: str) -> set[str]:
    """Return the paths named under the heading `### title`."""
    [body] = re.findall(rf"^### {title}\n(.*?)(?=^##)", TEXT, re.M | re.S)
    return paths_in(body)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def missing_from(title: str, paths: set[Path]) -> set[str]:
    """Return those of `paths` that the list does not name."""
    return {name_of(path) for path in paths} - section(title)


@cache
def words_of(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the string constants of a Python file, and the dotted names that it imports.

    Its syntax tree is not kept: those of all files would be a million objects.
    """
    constants, names = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            constants.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(constants), frozenset(names)


def constants_of(path: Path) -> frozenset[str]:
    """Return the string constants of a Python file, docstrings among them."""
    return words_of(path)[0]


def imports_of(path: Path) -> frozenset[str]:
    """Return the dotted names that a Python file imports."""
    return words_of(path)[1]


def imports_from(path: Path, modules: set[str]) -> bool:
    """Say whether the file imports one of these modules, or anything below it."""
    prefixes = tuple(f"{module}." for module in modules)
    return any(name in modules or name.startswith(prefixes) for name in imports_of(path))


def test_every_path_exists():
    named = paths_in(TEXT)
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_command_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert {"serve", "test", "test-slow", "test-drill", "lint", "bench"} <= named <= targets


def test_every_marker_is_explained():
    settings = (ROOT / "pyproject.toml").read_text()
    [markers] = re.findall(r"^markers = \[\n(.*?)^\]", settings, re.M | re.S)
    for name in re.findall(r'^ +"(\w+):', markers, re.M):
        assert f"@pytest.mark.{name}" in TEXT


def test_the_code_that_names_a_tier_is_listed():
    naming = {path for path in PACKAGE if constants_of(path) & TIER_NAMES}
    assert missing_from("A tier", naming) == set()


def test_the_files_that_deploy_a_tier_are_listed():
    """A name ends where a word does: `tiny` is not named by `destiny` or `tiny-ish`."""
    name = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, TIER_NAMES))})(?![\w-])")
    naming = {path for path in DEPLOYMENT if name.search(path.read_text())}
    assert len(naming) >= 3
    assert missing_from("A tier", naming) == set()


def test_the_tests_that_hold_every_published_tier_are_listed():
    holding = {path for path in TESTS if constants_of(path) >= PUBLISHED}
    assert holding
    assert missing_from("A tier", holding) == set()


def test_the_tests_that_count_every_size_are_listed():
    """A size is a row of `WORKLOADS`; its first tier stands for the others."""
    first = {id(work): name for name, work in reversed(WORKLOADS.items())}
    counting = {path for path in TESTS if "WORKLOADS" in path.read_text()}
    counting = {path for path in counting if constants_of(path) >= set(first.values())}
    assert counting
    assert missing_from("A tier", counting) == set()


def test_the_code_that_names_a_family_is_listed():
    outside = {path for path in PACKAGE if not set(FAMILY_FOLDERS) & set(path.parents)}
    naming = {path for path in outside if constants_of(path) & FAMILIES}
    assert naming
    assert missing_from("A model family", naming) == set()


@pytest.mark.parametrize("folder", FAMILY_FOLDERS, ids=name_of)
def test_the_code_that_imports_a_familys_folder_is_listed(folder: Path):
    module = name_of(folder).replace("/", ".")
    outside = {path for path in PACKAGE if folder not in path.parents}
    importing = {path for path in outside if imports_from(path, {module})}
    assert importing
    assert missing_from("A model family", importing) == set()


@pytest.mark.parametrize("folder", FAMILY_FOLDERS, ids=name_of)
def test_a_family_has_its_tests_and_its_rule_of_imports(folder: Path):
    assert (ROOT / "tests/engine" / folder.name).is_dir()
    ruling = {path for path in TESTS if f"engine/{folder.name}" in constants_of(path)}
    assert ruling
    assert missing_from("A model family", ruling) == set()


def is_of_a_dialect(path: Path) -> bool:
    return any(
        name_of(path).startswith((f"flux_ray/gateway/{name}/", f"flux_ray/gateway/{name}.py"))
        for name in DIALECT_MODULES
    )


def test_every_dialect_is_known_here():
    """Whoever adds one adds it to the two tables above, too."""
    assert DIALECT_PATHS.keys() == set(get_args(Dialect))
    assert len(DIALECT_MODULES) == len(DIALECT_PATHS)
    gateway = ROOT / "flux_ray/gateway"
    for name in DIALECT_MODULES:
        assert (gateway / name).is_dir() or (gateway / f"{name}.py").is_file()


def test_the_code_that_knows_a_dialect_is_listed():
    modules = {f"flux_ray.gateway.{name}" for name in DIALECT_MODULES}
    outside = {path for path in PACKAGE if not is_of_a_dialect(path)}
    knowing = {
        path
        for path in outside
        if imports_from(path, modules) or constants_of(path) & DIALECT_PATHS.keys()
    }
    assert len(knowing) >= 2
    assert missing_from("An API dialect", knowing) == set()


def dialects_asked_by(path: Path) -> set[str]:
    """Return the dialects whose paths a test file asks for."""
    asked = constants_of(path)
    return {
        dialect
        for dialect, begins in DIALECT_PATHS.items()
        if any(begins.match(constant) for constant in asked)
    }


def test_the_tests_that_ask_in_every_dialect_are_listed():
    asking = {path for path in TESTS if dialects_asked_by(path) == DIALECT_PATHS.keys()}
    assert asking
    assert missing_from("An API dialect", asking) == set()


@pytest.mark.parametrize("name", ROWS)
def test_the_code_that_counts_a_metric_is_listed(name: str):
    counting = {path for path in PACKAGE if f"flux_ray.metrics.{name}" in imports_of(path)}
    assert counting, "nobody counts it"
    assert missing_from("A metric", counting) == set()


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_metrics_name_is_spelt_once(row: Metric):
    spelling = {path for path in PACKAGE if row.name in constants_of(path)}
    assert [name_of(path) for path in spelling] == ["flux_ray/metrics.py"]
    assert missing_from("A metric", spelling) == set()


def test_what_shows_metrics_is_listed():
    """Dashboards and alerts go by a metric's name, which the tests of the code do not see."""
    showing = {
        path
        for path in DEPLOYMENT
        if any(f"ray_{row.name}" in path.read_text() for row in ROWS.values())
    }
    assert missing_from("A metric", showing) == set()


def test_the_version_is_written_once():
    version = re.compile(rf"""["']{re.escape(flux_ray.__version__)}["']""")
    writing = [name_of(path) for path in PACKAGE if version.search(path.read_text())]
    assert writing == ["flux_ray/__init__.py"]
    assert 'dynamic.version.attr = "flux_ray.__version__"' in (ROOT / "pyproject.toml").read_text()


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert flux_ray.__version__ in headings


def test_the_life_of_a_request_can_be_followed_by_grep():
    """README names folders and files of flux_ray/, and what to look for in them."""
    readme = (ROOT / "README.md").read_text()
    [life] = re.findall(r"^## The life of a request\n(.*?)^## ", readme, re.M | re.S)
    words = set(re.findall(r"`([\w./]+)`", life)) - {"flux_ray/"}
    paths = {word for word in words if "/" in word or word.endswith(".py")}
    assert {path for path in paths if not (ROOT / "flux_ray" / path).exists()} == set()
    code = "\n".join(path.read_text() for path in PACKAGE)
    defined = set(re.findall(r"\b(?:class|def) (\w+)", code))
    assert words - paths <= defined
