"""What gateways and replicas tell each other, in plain values that code of any version can read.

While a cluster is upgraded, old gateways speak to new replicas and new ones to old. Pickled as it
is, a dataclass arrives with its sender's fields, and one that the receiver does not know is ignored
in silence. So values travel as dicts of what differs from its default, with the sender's PROTOCOL:
a request must be understood whole, or it would be another image than the one that was asked for; of
an answer, what is not understood is left out. Bytes are handed on as they are, not copied.
"""

from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from flux_ray.errors import ProtocolMismatch
from flux_ray.request import PROTOCOL, ImageRequest, ImageResult, RequestEvent

# The keys of a call and of an answer, besides what `pack_call` is given. They never change: the
# request routers of old tiers read them in new gateways too.
Wire = dict[str, Any]


@dataclass(frozen=True)
class Description:
    """What a replica tells a gateway of itself.

    `replica`: its name in Serve. `layout`: what its results call the way in which it is laid out.
    `args`: its TierArgs as JSON. `card`: its row in `catalog.gpus`, None for one that is not there.
    `started_at_s`: seconds since 1970.
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
    """A value of ours as dicts and tuples of plain values."""
    if is_dataclass(value):
        return {
            each.name: packed(getattr(value, each.name))
            for each in fields(value)
            if not has_default(value, each)
        }
    return tuple(map(packed, value)) if isinstance(value, tuple) else value


def has_default(value: Any, field: Field[Any]) -> bool:
    """Whether the field of that value is what it would be if nobody had said anything."""
    return field.default is not MISSING and bool(getattr(value, field.name) == field.default)


def pack_call(tier: str, request_id: str) -> Wire:
    """A call to a replica of that tier that says nothing else."""
    return {"protocol": PROTOCOL, "tier": tier, "request_id": request_id}


def pack_request(request: ImageRequest, run: str = "") -> Wire:
    """A call for the images of a request; `run` is what it is known by when it comes again."""
    call = {**pack_call(request.tier, request.request_id), "request": packed(request)}
    return call | {"run": run} if run else call


def pack_recall(tier: str, request_id: str, run: str) -> Wire:
    """A call for the images of a request that came before; older code takes it for none."""
    return {**pack_call(tier, request_id), "recall": run}


def request_from(call: Wire) -> ImageRequest:
    """The request of a call. ProtocolMismatch names what this code does not know of it."""
    try:
        # Nested fields too, and words that a field may not have here.
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
    """What a replica says of a request."""
    return {"protocol": PROTOCOL, "kind": type(value).__name__, "value": packed(value)}


def answer_from(answer: Wire) -> RequestEvent | ImageResult | None:
    """What a replica said; None for news of a kind that this code does not know."""
    kind = ANSWERS.get(answer["kind"])
    if kind is None:
        return None
    value: RequestEvent | ImageResult = validated(kind, answer["value"], answer["protocol"])
    return value


def description_from(answer: Wire) -> Description:
    """What a replica said of itself."""
    description: Description = validated(DESCRIPTION, answer, answer["protocol"])
    return description


def validated(kind: TypeAdapter[Any], value: Any, protocol: int) -> Any:
    """What a replica of that protocol said, as far as this code knows its fields."""
    try:
        return kind.validate_python(value, extra="ignore")
    except ValidationError as error:
        raise ProtocolMismatch(
            f"a replica is of another version than this gateway, which cannot read its answer:"
            f" {error.errors()[0]['msg']}",
            None,
            protocol,
        ) from None
