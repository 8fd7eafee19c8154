"""What runs in Serve's proxies before they listen: Ray is told of it by an environment variable.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=flux_ray.gateway.proxy:read_with_h11`, where Ray starts.
"""

from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

from flux_ray.gateway.proxy_answers import ProxyAnswers


def read_with_h11() -> list[Middleware]:
    """Have this process's HTTP read by h11, where uvicorn would take httptools.

    httptools takes what follows an offer to upgrade for another protocol: the body of every
    request of a JDK's HttpClient, which offers HTTP/2, is lost. And it keeps headers without end,
    before any key is asked; h11 takes 16 kB of them.

    Returned is what is put around the proxy: it has the last word where a gateway has died.
    """
    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return [Middleware(ProxyAnswers)]
