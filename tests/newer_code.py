"""The code of a next version of ours: it knows one field more of a request, and speaks of it.

A prompt that ends in `SHARP` is what sets the field, so that nothing but the version of a gateway
decides whether it does.
"""

import re
import shutil
from pathlib import Path

import flux_ray
from flux_ray.request import PROTOCOL

SHARP = "sharply"
VERSION = "newer"
FIELD = f'''
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        """A client asked for it."""
        if self.prompt.endswith("{SHARP}"):
            object.__setattr__(self, "sharpness", 1.0)
'''


# Python runs this when it starts. Ray puts the folder that a driver was started in before
# PYTHONPATH, and so would have old code imported from there.
FINDER = """
import sys
from importlib.machinery import PathFinder


class Newer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{folder!r}]) if name == "flux_ray" else None


sys.meta_path.insert(0, Newer)
"""


def save_newer_code(folder: Path) -> None:
    """A copy of the package, for processes that have this folder in their PYTHONPATH."""
    package = folder / "flux_ray"
    source = Path(flux_ray.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    request = package / "request.py"
    text = request.read_text()
    changed = re.sub(r"^PROTOCOL = .*$", f"PROTOCOL = {PROTOCOL + 1}", text, flags=re.M)
    changed = re.sub(
        r"(class ImageRequest:.*?)(\n    @property)", rf"\1{FIELD}\2", changed, count=1, flags=re.S
    )
    assert changed.count(FIELD) == 1
    request.write_text(changed)
    start = package / "__init__.py"
    start.write_text(re.sub('__version__ = ".*"', f'__version__ = "{VERSION}"', start.read_text()))
    (folder / "sitecustomize.py").write_text(FINDER.format(folder=str(folder)))
