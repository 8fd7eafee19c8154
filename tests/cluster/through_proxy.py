"""Send what odd clients send through Serve's proxy, and a large answer; print what became of them.

test_make_serve.py runs this script with the environment that `make serve` sets.
"""

import socket
import sys

import httpx
import ray
from fastapi import FastAPI, Request
from ray import serve
from starlette.responses import Response

api = FastAPI()
BODY = b'{"prompt": "a ring"}'
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)


@serve.deployment
@serve.ingress(api)
class Bytes:
    """A deployment that counts the bytes of a body, and answers with as many as are asked for."""

    @api.post("/")
    async def count(self, request: Request) -> int:
        return len(await request.body())

    @api.get("/{num_bytes}")
    async def answer(self, num_bytes: int) -> Response:
        return Response(b"x" * num_bytes)


def answer_to(port: int, request: bytes) -> str:
    """Return the answer up to the first bytes of its body, or until the connection ends."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        try:
            link.sendall(request)
            while not answer.partition(b"\r\n\r\n")[2] and (more := link.recv(4096)):
                answer += more
        except ConnectionError:
            pass
    return answer.decode()


def main(port: int, num_bytes: int) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Bytes.bind(), name="bytes")
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    answer = answer_to(port, head + OFFER + LENGTH + BODY)
    print("upgrade offered:", answer.split(" ")[1], answer.rpartition("\r\n")[2])
    endless = answer_to(port, head + b"".join(b"X-%d: %2000d\r\n" % (n, n) for n in range(99)))
    print("endless headers:", "taken" if " 200 " in endless else "refused")
    large = httpx.get(f"http://127.0.0.1:{port}/{num_bytes}", timeout=300, trust_env=False)
    print("large answer:", large.status_code, len(large.content))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
