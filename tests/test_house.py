"""The house keeps its own rules: who may import whom, how long things are, what README says."""

import ast
import re
import runpy
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from flux_ray.cli.main import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flux_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})

NOUNS = {
    "auth",
    "catalog",
    "config",
    "deferred",
    "errors",
    "following",
    "liveness",
    "metrics",
    "private_files",
    "request",
    "resizing",
    "stages",
    "tracing",
    "wire",
}
# Of our own rooms: whom each may import besides itself. The nouns see each other only.
MAY_IMPORT = {
    "gateway": NOUNS | {"jobs", "router", "safety"},
    "jobs": NOUNS | {"router"},
    "router": NOUNS | {"meter"},
    "replica": NOUNS | {"meter", "engine", "parallel", "safety", "weights"},
    "meter": {"metrics"},
    "engine": NOUNS | {"parallel", "tiny", "weights"},
    "parallel": NOUNS | {"weights"},
    "planner": NOUNS | {"engine", "parallel"},
    "safety": NOUNS,
    "tiny": {"catalog", "request"},
    "simulator": NOUNS | {"router"},
    "weights": NOUNS | {"tiny"},
    "cli": NOUNS | {"engine", "planner", "router", "simulator", "weights"},
    "app": NOUNS | {"gateway", "jobs", "router", "replica", "safety"},
} | dict.fromkeys(NOUNS, NOUNS)
# Of the folders inside of a room: which of the files and folders beside it each may import.
MAY_IMPORT_BESIDE = {
    "gateway/images": {"memory_budget", "model_names"},
    "gateway/fields": {"images"},
    "router/pricing": set(),
    "router/queue": set(),
    "router/quotas": set(),
    "router/ledger": {"pricing", "queue", "quotas", "background", "handover"},
    "router/autoscaling": {"ledger"},
    "engine/flux1": {
        "api",
        "empty_model",
        "flow",
        "images",
        "inpainting",
        "loading",
        "rotary",
        "vae",
    },
    "engine/flux2": {
        "api",
        "empty_model",
        "flow",
        "images",
        "inpainting",
        "loading",
        "rotary",
        "vae",
    },
    "engine/flux3": {"api", "empty_model", "flow", "images", "loading", "rotary", "vae"},
}
# Rooms that load neither Ray nor torch: whoever is outside takes names from the room, not from a
# file of it.
FACES = ("auth", "catalog", "config", "router/pricing", "router/queue", "router/quotas")
MODELS = {"diffusers", "transformers", "accelerate"}
TENSORS = MODELS | {"torch"}
HTTP = {"fastapi", "starlette", "httpx", "uvicorn"}
# Of other people's packages: what no file of a room imports.
MAY_NOT_IMPORT = {
    "gateway": TENSORS | {"ray"},
    "jobs": TENSORS,
    "router": TENSORS | HTTP,
    "replica": MODELS | HTTP,
    "meter": TENSORS | HTTP,
    "engine": HTTP | {"ray"},
    "parallel": HTTP | {"ray"},
    "planner": HTTP | {"ray"},
    "safety": {"ray"},
    "tiny": HTTP | {"ray"},
    "simulator": TENSORS | HTTP | {"ray"},
    "weights": TENSORS | HTTP | {"ray"},
    "cli": TENSORS | {"ray"},
    "app": TENSORS,
} | dict.fromkeys(NOUNS, TENSORS | HTTP | {"ray"})
# Decisions stay plain functions and objects; only these files of the router know Ray.
RAY_HANDS = {
    "router/autoscaling/policy.py",
    "router/dispatch.py",
    "router/ledger/hung_processes.py",
    "router/ledger/placement.py",
    "router/ledger/remote.py",
    "router/ledger/actor.py",
    "router/readiness.py",
    "router/replica_choice.py",
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc", "base", "manager", "constants"}


def room_of(path: Path) -> str:
    """`gateway` for flux_ray/gateway/api.py, `errors` for flux_ray/errors.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def imports_of(path: Path) -> set[str]:
    """Every module that the file names, wherever in the file, with the names taken from it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room == "__init__":
        assert imports_of(path) == set()
        return
    for name in imports_of(path):
        package, *inner = name.split(".")
        if package == "flux_ray" and inner[0] != "__version__":
            assert inner[0] in MAY_IMPORT[room] | {room}, f"{path.name} imports {name}"
        assert package not in MAY_NOT_IMPORT[room], f"{path.name} imports {name}"


def beside(folder: Path, path: Path) -> set[str]:
    """Of the files and folders in `folder`: those that a file somewhere below it imports."""
    prefix = ".".join(folder.relative_to(ROOT).parts) + "."
    there = {each.stem for each in folder.iterdir() if each.suffix in ("", ".py")}
    named = {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}
    own = path.relative_to(folder).with_suffix("").parts[0]
    return ({name.split(".")[0] for name in named} & there) - {own}


@pytest.mark.parametrize("folder", MAY_IMPORT_BESIDE)
def test_folders_inside_of_a_room_know_what_they_may(folder):
    above = (PACKAGE / folder).parent
    for path in (PACKAGE / folder).rglob("*.py"):
        assert beside(above, path) <= MAY_IMPORT_BESIDE[folder], path.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_lies_beside_each_other_imports_one_way(folder):
    """So that each file and folder can be read and tested without what is above it."""
    graph: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        entry = path.relative_to(folder).with_suffix("").parts[0]
        graph.setdefault(entry, set()).update(beside(folder, path))
    # A CycleError names the cycle.
    assert set(TopologicalSorter(graph).static_order()) >= graph.keys()


@pytest.mark.parametrize("room", FACES)
def test_light_rooms_are_imported_by_their_faces(room):
    prefix = f"flux_ray.{room.replace('/', '.')}."
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")}
    for path in SOURCES:
        if not path.is_relative_to(PACKAGE / room):
            named = {name for name in imports_of(path) if name.startswith(prefix)}
            assert not {name.removeprefix(prefix).split(".")[0] for name in named} & modules, path


def test_the_engine_knows_only_where_the_embedded_checkpoint_is():
    names = {name for path in (PACKAGE / "engine").rglob("*.py") for name in imports_of(path)}
    assert {n for n in names if n.startswith("flux_ray.tiny")} <= {"flux_ray.tiny.KLEIN_CHECKPOINT"}


def test_only_the_routers_hands_touch_ray():
    touching = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / "router").rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports_of(path))
    }
    assert touching == RAY_HANDS


def test_the_graph_imports_without_torch():
    code = "import sys, flux_ray.app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not TENSORS & set(loaded)


def test_the_command_starts_without_torch():
    """Only `plan` needs it, and imports it when it is called."""
    code = "import sys, flux_ray.cli.main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not (TENSORS | {"ray"}) & set(loaded)


def test_only_the_client_makes_control_images():
    """So that no server needs OpenCV."""
    making = ("cv2", "flux_ray.engine.control")
    assert {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if any(f"{name}.".startswith(f"{each}.") for name in imports_of(path) for each in making)
    } == {"engine/control.py", "cli/generate.py"}


def test_names_say_what_is_inside():
    names = {path.stem for path in PACKAGE.rglob("*") if path.suffix in ("", ".py")}
    assert not names & FORBIDDEN_NAMES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_their_job(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, functions) and node.end_lineno - node.lineno + 1 > 40
    }
    assert not long


def test_a_class_has_its_name_alone():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_a_short_file_serves_more_than_one_other():
    """What one file alone needs, and can be read in a moment, is a part of that file."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    importers: dict[str, set[Path]] = {name: set() for name in modules}
    for path in SOURCES:
        for name in imports_of(path):
            for module in {name, name.rpartition(".")[0]} & modules.keys():
                importers[module].add(path)
    thin = [
        str(path.relative_to(PACKAGE))
        for name, path in modules.items()
        if 5 < len(path.read_text().splitlines()) < 40
        and len(importers[name]) < 2
        and "migrations" not in path.parts
        and path.name != "__init__.py"
    ]
    assert thin == []


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


README = ROOT / "README.md"


def readme_tree() -> set[str]:
    """The paths of the first fenced block that begins with a folder, one a line."""
    for block in re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.M | re.S):
        words = [line.split()[0] for line in block.splitlines() if line.strip()]
        if words[0].endswith("/"):
            return {word.rstrip("/") for word in words if word != "flux-ray/"}
    raise AssertionError("README.md shows no file tree")


def listed_paths(tree: set[str]) -> set[Path]:
    """A path is written from the top of the repository, or from flux_ray/."""
    return {ROOT / name if (ROOT / name).exists() else PACKAGE / name for name in tree}


def test_readme_tree_is_there():
    assert [path for path in listed_paths(readme_tree()) if not path.exists()] == []


def test_readme_tree_is_whole():
    listed = listed_paths(readme_tree())
    unread = ("__", ".", "py.typed")
    inside = {path for path in PACKAGE.iterdir() if not path.name.startswith(unread)}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    top = {path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    visible = {path for path in top if not any(path.match(pattern) for pattern in ignored)}
    assert (inside | visible) - listed == set()


def exit_code_of(module: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Of `python -m module --help`, without the seconds that another process takes for torch."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return ended.value.code


def test_readme_commands_are_there(monkeypatch):
    text = README.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    code = "\n".join(re.findall(r"```\w*\n.*?```|(?<=`)[^`\n]+(?=`)", text, re.S))
    named = set(re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", code, re.M))
    assert named >= {"serve", "test"}
    assert named <= targets
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    used = set(re.findall(r"^(?:\$ )?\S*flux-ray ([a-z][a-z-]*)", code, re.M))
    assert "generate" in used
    assert used <= commands
    modules = set(re.findall(r"python3? -m (flux_ray[\w.]*)", text))
    assert modules
    for module in modules:
        assert exit_code_of(module, monkeypatch) == 0, module


def test_torch_is_pinned_once():
    """make installs it before it reads what else is needed."""
    pins = [
        re.findall(r"torch==([\w.]+)", (ROOT / name).read_text())
        for name in ("Makefile", "pyproject.toml")
    ]
    assert pins[0] == pins[1] and len(pins[0]) == 1
