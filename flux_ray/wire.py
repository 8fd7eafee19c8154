"""Encode what gateways and replicas send each other, so that code of any version can read it.

While a cluster is upgraded, old gateways speak to new replicas and new gateways to old ones. A
pickled dataclass would arrive with its sender's fields, and a field that the receiver does not know
would be ignored silently. So values travel as dicts, with the sender's PROTOCOL and only those
fields that differ from their defaults. A request must be understood completely, or another image
would be generated than was asked for. In an answer, unknown fields are left out. Bytes are passed
on as they are, not copied.
"""

from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from flux_ray.errors import ProtocolMismatch
from flux_ray.request import PROTOCOL, ImageRequest, ImageResult, RequestEvent

# A call or an answer. The keys that `pack_call` sets must never change: request routers with the
# code of old tiers read them in new gateways too.
Wire = dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The values that a replica tells a gateway about itself.

    `replica`: its name in Serve. `layout`: the name of its layout, which its results carry too.
    `args`: its TierArgs as JSON. `card`: the name of its GPU in `catalog.gpus`, None if it is not
    there. `started_at_s`: seconds since 1970.
    """

    protocol: int
    replica: str
    layout: str
    args: dict[str, Any]
    card: str | None
    started_at_s: float


REQUEST = TypeAdapter(ImageRequest)
DESCRIPTION = TypeAdapter(Description)
ANSWERS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (ImageResult, *get_args(RequestEvent))
}


def packed(value: Any) -> Any:
    """Return a dataclass, or a tuple of them, as dicts and tuples of plain values."""
    if is_dataclass(value):
        return {
            each.name: packed(getattr(value, each.name))
            for each in fields(value)
            if not has_default(value, each)
        }
    return tuple(map(packed, value)) if isinstance(value, tuple) else value


def has_default(value: Any, field: Field[Any]) -> bool:
    """Return whether the field of that value has its default."""
    return field.default is not MISSING and bool(getattr(value, field.name) == field.default)


def pack_call(tier: str, request_id: str) -> Wire:
    """Return a call to a replica of that tier that has only the keys of every call."""
    return {"protocol": PROTOCOL, "tier": tier, "request_id": request_id}


def pack_request(request: ImageRequest, run: str = "") -> Wire:
    """Return a call for the images of a request; `run` is the name by which retries find them."""
    call = {**pack_call(request.tier, request.request_id), "request": packed(request)}
    return call | {"run": run} if run else call


def pack_recall(tier: str, request_id: str, run: str) -> Wire:
    """Return a call for the images of an earlier request; older code cannot read it as one."""
    return {**pack_call(tier, request_id), "recall": run}


def request_from(call: Wire) -> ImageRequest:
    """Return the request of a call; ProtocolMismatch names fields that this code cannot read."""
    try:
        # This also checks nested fields, and values that a field may not have in this version.
        return REQUEST.validate_python(call.get("request"), extra="forbid")
    except ValidationError as error:
        names = dict.fromkeys(".".join(map(str, each["loc"])) for each in error.errors())
        raise ProtocolMismatch(
            f"a replica of {call.get('tier')} is of another version than this gateway and cannot"
            f" read {', '.join(names)} of the request; try again when the upgrade is done",
            None,
            PROTOCOL,
        ) from None


def pack_answer(value: RequestEvent | ImageResult) -> Wire:
    """Encode an event or the result of a request, for a replica to send."""
    return {"protocol": PROTOCOL, "kind": type(value).__name__, "value": packed(value)}


def answer_from(answer: Wire) -> RequestEvent | ImageResult | None:
    """Decode what a replica sent; None for an event of a kind that this code does not know."""
    kind = ANSWERS.get(answer["kind"])
    if kind is None:
        return None
    value: RequestEvent | ImageResult = validated(kind, answer["value"], answer["protocol"])
    return value


def description_from(answer: Wire) -> Description:
    """Decode what a replica sent about itself."""
    description: Description = validated(DESCRIPTION, answer, answer["protocol"])
    return description


def validated(kind: TypeAdapter[Any], value: Any, protocol: int) -> Any:
    """Validate what a replica of that protocol sent, ignoring fields that are unknown here.

    Raise ProtocolMismatch if what is left cannot be read.
    """
    try:
        return kind.validate_python(value, extra="ignore")
    except ValidationError as error:
        raise ProtocolMismatch(
            f"a replica is of another version than this gateway, which cannot read its answer:"
            f" {error.errors()[0]['msg']}",
            None,
            protocol,
        ) from None
