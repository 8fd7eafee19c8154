"""Say in Serve's log whose request a line is about, and nothing of probes.

With `encoding: JSON` Serve adds the id of the HTTP request, its route and the replica to each line.
`RequestLog` adds `key`, the name of the API key, and leaves out the access lines of probes: they
come every second, and hide all others.
"""

import logging
from contextvars import ContextVar

from flux_ray.gateway.probes import is_probe

# The name of the key under which the present request came.
_KEY: ContextVar[str] = ContextVar("key", default="")
# By id, for Serve's access line: it is written when the request is over, outside of its context.
_KEYS: dict[str, str] = {}
# If Serve writes no access lines, nothing else takes the names out.
MAX_KEYS = 4096


def note_key(request_id: str, name: str) -> None:
    """Note under which key the present request came, for all lines about it."""
    _KEY.set(name)
    _KEYS.pop(request_id, None)
    _KEYS[request_id] = name
    if len(_KEYS) > MAX_KEYS:
        del _KEYS[next(iter(_KEYS))]


class RequestLog(logging.Filter):
    """A filter of the logger `ray.serve`, in gateways and in the proxies in front of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for the access line of a probe; else add the key's name, if there is one."""
        key = _KEY.get()
        if getattr(record, "serve_access_log", False):
            if is_probe(getattr(record, "route", "") or ""):
                return False
            key = _KEYS.pop(getattr(record, "request_id", ""), "")
        if key:
            record.key = key
        return True


def watch_requests() -> None:
    """Add the filter in this process; a second call has no effect."""
    logger = logging.getLogger("ray.serve")
    if not any(isinstance(each, RequestLog) for each in logger.filters):
        logger.addFilter(RequestLog())
