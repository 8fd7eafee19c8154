"""Every error that flux-ray raises on purpose, with its HTTP status.

FluxError                 500  server_error
  BadRequest              400  the caller's words are wrong; the message and the field are shown
    UnknownTier           404  no such tier here
    UnknownResult         404  no such image, or none for that URL
    InvalidKey            401  no key was sent, or none that is let in
    LicenseForbids        403  the caller's key may not use a tier of that licence
    TierForbidden         403  the caller's key may not use that tier
    QuotaTooSmall         403  the request alone is more than the caller's key may use in a day
    BadReference          400  a reference image is no image, too large, too many
    DeadlineTooShort      400  the work alone takes longer
    BodyTooLarge          413  more bytes than this gateway reads
    BodyTooSlow           408  a body that does not come in time
    WrongContentType      415  a body in a format that this route does not read
      WrongEncoding       415  a body that is packed in a way that is not unpacked here
    KeyReused             422  an idempotency key came again with another request
  Overloaded              429  it would miss its deadline; the answer says when it would not
  RateLimited             429  the caller's key has as much as it may have for now
    QuotaSpent            429  the same, for today
  GatewayFull             503  this gateway has as many requests in hand as it may
  TierUnavailable         503  the tier is configured, but no replica of it can serve now
    ProtocolMismatch      503  none that can serve is of a version that can read the request
  ReplicaFailed           503  a rank or its replica died; the router tries once more, elsewhere
    NotKept               503  images that were asked for again; they are drawn anew
    KilledForMemory       503  Ray killed a process of it, as its node was out of memory
  GatewayFailed           503  a gateway died under the request
  OutOfMemory             500  the request takes more memory than a replica has; not tried again
  StoreLost               503  the store of durable jobs cannot be reached
    ResultsLost           503  the store of their images cannot
  DeadlinePassed          504  the request took longer than the gateway waits

Arguments are positional only, so that every error survives a process border. Where the code on
the other side is older and does not know its class, it arrives as the nearest one that is known.
"""

from typing import Any, ClassVar


class FluxError(Exception):
    """A failure; its message is shown to the caller, unless `shown` says something else."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return revived, (tuple(kind.__name__ for kind in type(self).__mro__), self.args)

    @property
    def shown(self) -> str:
        """What the caller reads."""
        return self.message


def revived(kinds: tuple[str, ...], args: tuple[Any, ...]) -> FluxError:
    """An error of the first of these classes that this code knows, as it was pickled."""
    known: type[FluxError] = next(globals()[kind] for kind in kinds if kind in globals())
    try:
        return known(*args)
    except TypeError:
        # A class has other arguments in another version; these two are those of every error.
        return known(*args[:2])


class BadRequest(FluxError):
    """The caller's words are wrong; `field` names which."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnknownTier(BadRequest):
    """No tier of that name is served here."""

    status = 404
    code = "model_not_found"


class UnknownResult(BadRequest):
    """No finished image for that URL: nobody is told why."""

    status = 404
    code = "result_not_found"


class LicenseForbids(BadRequest):
    """The caller's key is for tiers of other licences."""

    status = 403
    type = "permission_error"
    code = "license_forbids"


class InvalidKey(BadRequest):
    """No key, or one that is unknown, malformed, expired or revoked: nobody is told which."""

    status = 401
    code = "invalid_api_key"


class TierForbidden(BadRequest):
    """The caller's key is for other tiers."""

    status = 403
    type = "permission_error"
    code = "tier_forbidden"


class QuotaTooSmall(BadRequest):
    """The request alone is more than the key may use in a day: coming back would not help."""

    status = 403
    type = "permission_error"
    code = "quota_too_small"


class BadReference(BadRequest):
    """A reference image cannot be used."""

    code = "invalid_image"


class DeadlineTooShort(BadRequest):
    """The work alone takes longer than the caller will wait: coming back would not help."""

    code = "deadline_too_short"


class BodyTooLarge(BadRequest):
    """The request has more bytes than the gateway reads."""

    status = 413
    code = "request_too_large"


class BodyTooSlow(BadRequest):
    """The request's body did not come in time."""

    status = 408
    code = "request_timeout"


class WrongContentType(BadRequest):
    """The body's format is not the one that the route reads."""

    status = 415
    code = "unsupported_content_type"


class WrongEncoding(WrongContentType):
    """The body is packed in a way that is not unpacked here; the answer says which ways are."""

    code = "unsupported_content_encoding"


class KeyReused(BadRequest):
    """The idempotency key is that of another request."""

    status = 422
    code = "idempotency_key_reused"


class GatewayFull(FluxError):
    """This gateway has as many requests in hand as it may; another one may have fewer."""

    status = 503
    code = "gateway_full"
    retry_after_s = 1


class TierUnavailable(FluxError):
    """A configured tier has no replica that can serve now."""

    status = 503
    code = "tier_unavailable"
    retry_after_s = 5


def not_deployed(tier: str) -> TierUnavailable:
    """It is configured, and nobody has deployed it."""
    return TierUnavailable(f"{tier} is not deployed", "model")


class ProtocolMismatch(TierUnavailable):
    """The code of `protocol` cannot read a request, or an answer, of other code."""

    def __init__(self, message: str, field: str | None = None, protocol: int = 0) -> None:
        super().__init__(message, field)
        # As every argument, it has to survive a process border.
        self.args = (message, field, protocol)
        self.protocol = protocol


class OutOfMemory(FluxError):
    """The request takes more memory than a replica has: trying again would not help."""

    code = "out_of_memory"


class ReplicaFailed(FluxError):
    """A rank died or its replica did; the request may be sent again with the same seed."""

    status = 503
    code = "replica_failed"
    retry_after_s = 5


class NotKept(ReplicaFailed):
    """The replica does not have what was asked for again: it has to be drawn anew."""


class KilledForMemory(ReplicaFailed):
    """Ray killed a process of the replica because its node was out of memory.

    That may be the fault of something else on the node, so the request gets its second try. If that
    ends in the same way, it is OutOfMemory.
    """


class GatewayFailed(FluxError):
    """The gateway that had the request ended before it answered; another one takes it again."""

    status = 503
    code = "gateway_failed"
    retry_after_s = 1


class StoreLost(FluxError):
    """The database of jobs did not answer: what it was told may or may not be known to it."""

    status = 503
    code = "store_unavailable"
    retry_after_s = 5

    @property
    def shown(self) -> str:
        """Its message is the store's own words, for the operator's log only."""
        return "jobs cannot be kept or found now"


class ResultsLost(StoreLost):
    """The results store did not answer, or did not take what it was given."""


class DeadlinePassed(FluxError):
    """The request took longer than the gateway waits for one."""

    status = 504
    code = "deadline_passed"


class Overloaded(FluxError):
    """The request would miss its deadline; `retry_after_s` seconds later it would not."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, field: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, field)
        # As every argument, it has to survive a process border.
        self.args = (message, field, retry_after_s)
        self.retry_after_s = retry_after_s


class RateLimited(FluxError):
    """The caller's key has all that it may have for now: `left` of `limit`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        field: str | None = None,
        retry_after_s: int = 1,
        limit: float = 0,
        left: float = 0,
    ) -> None:
        super().__init__(message, field)
        # As every argument, they have to survive a process border.
        self.args = (message, field, retry_after_s, limit, left)
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.left = left


class QuotaSpent(RateLimited):
    """The key has used what it may use in a day: only the next day helps."""

    code = "insufficient_quota"
