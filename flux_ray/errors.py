"""Every error that flux-ray raises on purpose, with its HTTP status.

FluxError                 500  server_error
  BadRequest              400  the request is wrong; the caller sees the message and the field
    UnknownTier           404  no such tier here
    UnknownResult         404  no such image, or none for that URL
    InvalidKey            401  no key was sent, or one that is not valid
    LicenseForbids        403  the caller's key may not use tiers of that licence
    TierForbidden         403  the caller's key may not use that tier
    QuotaTooSmall         403  the request alone is more than the caller's key may use in a day
    BadReference          400  a reference is no image, or too large, or one too many
    DeadlineTooShort      400  the work alone takes longer than the deadline allows
    BodyTooLarge          413  more bytes than this gateway reads
    BodyTooSlow           408  the body does not come in time
    WrongContentType      415  the body has a format that this route does not read
      WrongEncoding       415  the body is compressed in a way that is not supported
    KeyReused             422  an idempotency key came again with another request
  Overloaded              429  the request would miss its deadline; Retry-After says when not
  RateLimited             429  the caller's key has reached a limit of the moment or minute
    QuotaSpent            429  the caller's key has reached a limit of the day
  GatewayFull             503  this gateway holds the maximum of requests
  TierUnavailable         503  the tier is configured, but no replica of it can serve now
    ProtocolMismatch      503  no replica that can serve has code that can read the request
  ReplicaFailed           503  a rank or its replica died; the router tries once more, elsewhere
    NotKept               503  the images of a retry are gone; they are generated anew
    KilledForMemory       503  a process of the replica was killed to free its node's memory
  GatewayFailed           503  the gateway died that had the request
  OutOfMemory             500  the request takes more memory than a replica has; not tried again
  StoreLost               503  the store of durable jobs cannot be reached
    ResultsLost           503  the store of their images cannot be reached
  DeadlinePassed          504  the request took longer than the gateway waits

Errors travel between processes, so they are built from positional arguments only. If the receiving
code is older and does not know the class, the error arrives as the nearest base class it knows.
"""

from typing import Any, ClassVar


class FluxError(Exception):
    """A failure that is reported to the caller, with its message unless `shown` differs.

    `field` names the field of the request that is wrong, if one is.
    """

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
        """The message that the caller reads."""
        return self.message


def revived(kinds: tuple[str, ...], args: tuple[Any, ...]) -> FluxError:
    """Rebuild an unpickled error, as the first of these classes that this code knows."""
    known: type[FluxError] = next(globals()[kind] for kind in kinds if kind in globals())
    try:
        return known(*args)
    except TypeError:
        # In another version the class has other arguments, but the first two are the same in all.
        return known(*args[:2])


class BadRequest(FluxError):
    """The request is wrong; `field` names what of it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnknownTier(BadRequest):
    """No tier of that name is served here."""

    status = 404
    code = "model_not_found"


class UnknownResult(BadRequest):
    """No finished image has that URL; the answer does not say why, lest it help to guess one."""

    status = 404
    code = "result_not_found"


class LicenseForbids(BadRequest):
    """The caller's key may not use tiers of this licence."""

    status = 403
    type = "permission_error"
    code = "license_forbids"


class InvalidKey(BadRequest):
    """The key is missing, unknown, malformed, expired or revoked; the answer does not say which."""

    status = 401
    code = "invalid_api_key"


class TierForbidden(BadRequest):
    """The caller's key may not use this tier."""

    status = 403
    type = "permission_error"
    code = "tier_forbidden"


class QuotaTooSmall(BadRequest):
    """The request alone is more than the key may use in a day, so a retry would not help."""

    status = 403
    type = "permission_error"
    code = "quota_too_small"


class BadReference(BadRequest):
    """A reference image cannot be used."""

    code = "invalid_image"


class DeadlineTooShort(BadRequest):
    """The work alone takes longer than the caller will wait, so a retry would not help."""

    code = "deadline_too_short"


class BodyTooLarge(BadRequest):
    """The request has more bytes than the gateway reads."""

    status = 413
    code = "request_too_large"


class BodyTooSlow(BadRequest):
    """The body of the request did not come in time."""

    status = 408
    code = "request_timeout"


class WrongContentType(BadRequest):
    """The body's format is not the one that the route reads."""

    status = 415
    code = "unsupported_content_type"


class WrongEncoding(WrongContentType):
    """The body is compressed in a way that is not supported; the answer names those that are."""

    code = "unsupported_content_encoding"


class KeyReused(BadRequest):
    """The idempotency key was used for another request before."""

    status = 422
    code = "idempotency_key_reused"


class GatewayFull(FluxError):
    """This gateway holds the maximum of requests; another one may have room."""

    status = 503
    code = "gateway_full"
    retry_after_s = 1


class TierUnavailable(FluxError):
    """A configured tier has no replica that can serve now."""

    status = 503
    code = "tier_unavailable"
    retry_after_s = 5


def not_deployed(tier: str) -> TierUnavailable:
    """Return the error for a tier that is configured but not deployed."""
    return TierUnavailable(f"{tier} is not deployed", "model")


class ProtocolMismatch(TierUnavailable):
    """The code of version `protocol` cannot read a request or an answer of another version."""

    def __init__(self, message: str, field: str | None = None, protocol: int = 0) -> None:
        super().__init__(message, field)
        # Pickling passes on `args` only.
        self.args = (message, field, protocol)
        self.protocol = protocol


class OutOfMemory(FluxError):
    """The request takes more memory than a replica has, so a retry would not help."""

    code = "out_of_memory"


class ReplicaFailed(FluxError):
    """A rank or its replica died; the request may be sent again with the same seed."""

    status = 503
    code = "replica_failed"
    retry_after_s = 5


class NotKept(ReplicaFailed):
    """The replica no longer has the images of a retry; they have to be generated anew."""


class KilledForMemory(ReplicaFailed):
    """Ray or the kernel killed a process of the replica because there was no memory left.

    Something else on the node may be the cause, so the request gets its second try. If that ends in
    the same way, the error is OutOfMemory.
    """


class GatewayFailed(FluxError):
    """The gateway that had the request ended before it answered; another takes a retry."""

    status = 503
    code = "gateway_failed"
    retry_after_s = 1


class StoreLost(FluxError):
    """The database of jobs did not answer; it is unknown whether it took what it was sent."""

    status = 503
    code = "store_unavailable"
    retry_after_s = 5

    @property
    def shown(self) -> str:
        """A fixed text: the message has the store's own words, which are for the log only."""
        return "jobs cannot be kept or found now"


class ResultsLost(StoreLost):
    """The results store did not answer, or did not take an image."""


class DeadlinePassed(FluxError):
    """The request took longer than the gateway waits for one."""

    status = 504
    code = "deadline_passed"


class Overloaded(FluxError):
    """There is no time or no room for the request now, but should be `retry_after_s` later."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, field: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, field)
        # Pickling passes on `args` only.
        self.args = (message, field, retry_after_s)
        self.retry_after_s = retry_after_s


class RateLimited(FluxError):
    """The caller, by key or by address, is at a limit for now; `left` of `limit` remains."""

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
        # Pickling passes on `args` only.
        self.args = (message, field, retry_after_s, limit, left)
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.left = left


class QuotaSpent(RateLimited):
    """The key has used what it may use in a day, so a retry helps on the next day only."""

    code = "insufficient_quota"
