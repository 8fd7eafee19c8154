"""Send requests as odd clients do through Serve's proxy, and print what became of them.

test_make_serve.py runs this script with the environment that `make serve` sets.
"""

import socket
import sys

import ray
from fastapi import FastAPI, Request
from ray import serve

api = FastAPI()
BODY = b'{"prompt": "a ring"}'
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)


@serve.deployment
@serve.ingress(api)
class Count:
    """A deployment that answers with the number of bytes of the body."""

    @api.post("/")
    async def answer(self, request: Request) -> int:
        return len(await request.body())


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


def main(port: int) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Count.bind(), name="count")
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    answer = answer_to(port, head + OFFER + LENGTH + BODY)
    print("upgrade offered:", answer.split(" ")[1], answer.rpartition("\r\n")[2])
    endless = answer_to(port, head + b"".join(b"X-%d: %2000d\r\n" % (n, n) for n in range(99)))
    print("endless headers:", "taken" if " 200 " in endless else "refused")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
