"""Write docs/configuration.md and docs/licences.md from the code: `python docs/reference.py`."""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flux_ray.auth import KeyClass
from flux_ray.catalog import TIERS, Tier
from flux_ray.config import (
    Alias,
    Autoscaling,
    Fetching,
    GatewayArgs,
    JobArgs,
    Limits,
    Lora,
    Parallel,
    TierArgs,
    TierUpsampling,
    Uploads,
    Upsampling,
    Webhooks,
)

DOCS = Path(__file__).parent
ARGS = {
    "The gateway": (
        *(GatewayArgs, Alias, KeyClass, Limits, Uploads, Fetching, Webhooks, JobArgs),
        *(Upsampling, TierUpsampling),
    ),
    "A tier": (TierArgs, Parallel, Autoscaling, Lora),
}
# What begins the description of one or more keys in a docstring.
KEYS = re.compile(r"(?:^|(?<=[.;] ))((?:`\w+`(?:, | and )?)+): ")
SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
CONFIGURATION = """# Configuration

What the `args` of an application in a Serve config file may say. A key that is not listed here is
an error, and so is a value of another type: both are found before anything is started, by
`flux-ray plan` too. This page is made from the classes in `flux_ray/config/` by `python
docs/reference.py`.

The rest of such a file is Ray Serve's: `http_options`, `logging_config`, and for each application
its `name`, its `route_prefix` (`/` for the gateway, `null` for tiers) and its `import_path`
(`flux_ray.app:build_gateway`, or `flux_ray.app:build_tier` for each tier). An example is
`serve/laptop.yaml`.
"""
LICENCES = """# Licences

flux-ray is under Apache-2.0, the embedded models `tiny` and `tiny-flux1` included. Every other one
has a licence of its own, which binds whoever serves it. `/v1/models` tells it to clients, and the
`licenses` of a [key's class](configuration.md#keyclass) say who may use which. This page is made
from `flux_ray/catalog/tiers.py` by `python docs/reference.py`.
"""


def meanings_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what the class's docstring, and those of its parents, say of each key."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if not issubclass(parent, BaseModel) or parent is BaseModel:
            continue
        text = " ".join((inspect.getdoc(parent) or "").split())
        _, *rest = KEYS.split(text)
        for names, meaning in zip(rest[::2], rest[1::2], strict=True):
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), meaning.strip())
    return found


def kind_of(annotation: Any) -> str:
    """Return a type in words that a reader of YAML knows."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(each) for each in inner if each is not type(None)))
    if origin is tuple:
        return f"list of {kind_of(inner[0])}"
    if origin is dict:
        return f"map to {kind_of(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path"}
    return names.get(annotation, "network" if "Network" in str(annotation) else "any value")


def bounds_of(field: FieldInfo) -> str:
    """Return the limits of a number, as in ` at least 1`."""
    told = [
        f" {sign} {getattr(each, name):g}"
        for each in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(each, name)
    ]
    return "".join(told)


def default_of(field: FieldInfo) -> str:
    """Return the default as YAML has it; an empty section says what is in its own table."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "-"
    if isinstance(value, BaseModel):
        return "its own"
    return f"`{in_yaml(value)}`"


def in_yaml(value: object) -> str:
    """Return a value as it is written in YAML, with `_` between thousands."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(in_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:_}".removesuffix(".0")
    return str(value)


def rows_of(model: type[BaseModel]) -> Iterator[str]:
    meanings = meanings_of(model)
    for name, field in model.model_fields.items():
        kind = kind_of(field.annotation) + bounds_of(field)
        yield f"| `{name}` | {kind} | {default_of(field)} | {meanings[name]} |"


def section_of(model: type[BaseModel]) -> str:
    first, *_ = (inspect.getdoc(model) or "").split("\n\n")
    head = "| key | value | default | meaning |\n|---|---|---|---|"
    return "\n".join(
        [f"### {model.__name__}", "", " ".join(first.split()), "", head, *rows_of(model)]
    )


def configuration() -> str:
    """Return docs/configuration.md."""
    pieces = [CONFIGURATION.rstrip()]
    for title, models in ARGS.items():
        pieces += [f"## {title}", *map(section_of, models)]
    return "\n\n".join(pieces) + "\n"


def licence_row(tier: Tier) -> str:
    """Return a tier's row of the table of licences."""
    return f"| `{tier.name}` | {tier.owner} | `{tier.license}` | {TERMS[tier.license]} |"


TERMS = {
    "apache-2.0": "any use, commercial too",
    "flux-non-commercial": (
        "no commercial use without a licence from Black Forest Labs; the hub asks you to accept it"
    ),
    "flux-kommunity": (
        "non-commercial use, and commercial use of its images by those whom the licence calls"
        " qualifying users; the hub asks you to accept it"
    ),
    "proprietary": "not public: from Black Forest Labs, by contract",
}


def licences() -> str:
    """Return docs/licences.md."""
    head = "| tier | owner of the weights | licence | which allows |\n|---|---|---|---|"
    return "\n".join([LICENCES, head, *map(licence_row, TIERS), ""])


PAGES = {"configuration.md": configuration, "licences.md": licences}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
