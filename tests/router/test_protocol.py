"""What gateways and the ledger tell each other changes only with the number of the protocol."""

import dataclasses
import hashlib
import inspect
import json
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from flux_ray.request import PROTOCOL
from flux_ray.router.ledger.actor import LedgerActor

# Where the last test fails, raise PROTOCOL, by which the ledger is named, and add a row: pickles
# and calls of the old code are not understood by the new one, nor the other way round.
# In the third, requests are told with what they count against limits, calls about quotas take one
# value each, and modules, by which pickles name messages, are others.
DIGESTS = {2: "c7b1f2178a169522", 3: "5804661b094c8ad3", 4: "98bb176891ddeb71"}


def shape_of(kind: Any) -> Any:
    """Return what a pickled value of this type is made of: names of fields, not of our classes."""
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(kind):
        hints = {each.name: get_type_hints(kind)[each.name] for each in dataclasses.fields(kind)}
    elif hasattr(kind, "_fields"):
        hints = {name: get_type_hints(kind)[name] for name in kind._fields}
    if hints:
        return [[name, shape_of(hint)] for name, hint in hints.items()]
    if get_origin(kind) is Literal:
        return sorted(get_args(kind))
    if get_origin(kind) is not None:
        return [get_origin(kind).__name__, *map(shape_of, get_args(kind))]
    return "..." if kind is ... else kind.__name__


def calls_of(actor: type) -> dict[str, Any]:
    """Return the shapes of what an actor's methods take and answer, by their names."""
    calls = {}
    for name, method in inspect.getmembers(actor, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            hints = get_type_hints(inspect.unwrap(method))
            calls[name] = [[argument, shape_of(hint)] for argument, hint in hints.items()]
    return calls


class Told(NamedTuple):
    name: str
    parts: tuple[float, ...] | None = None


class ToldElsewhere(NamedTuple):
    name: str
    parts: tuple[float, ...] | None = None


@dataclasses.dataclass
class ToldOtherwise:
    name: str
    parts: tuple[int, ...] | None = None


def test_a_shape_is_of_fields_and_not_of_the_names_of_classes() -> None:
    assert shape_of(Told) == shape_of(ToldElsewhere)
    assert shape_of(Told) != shape_of(ToldOtherwise)
    assert shape_of(dict[str, Told]) != shape_of(dict[str, str])


def test_what_the_ledger_is_told_and_tells_changes_only_with_the_protocol() -> None:
    calls = calls_of(LedgerActor)
    assert {"say", "listen", "enter", "backlog"} <= calls.keys()
    digest = hashlib.sha256(json.dumps(calls).encode()).hexdigest()[:16]
    assert DIGESTS.get(PROTOCOL) == digest, "say it by a new number, see DIGESTS"
