"""Send a large answer through Serve's proxy, and print whether it arrived.

test_make_serve.py runs this script with the environment that `make serve` sets.
"""

import sys

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from starlette.responses import Response

api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Large:
    """A deployment that answers with as many bytes as are asked for."""

    @api.get("/{num_bytes}")
    async def answer(self, num_bytes: int) -> Response:
        return Response(b"x" * num_bytes)


def main(port: int, num_bytes: int) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Large.bind(), name="large")
    answer = httpx.get(f"http://127.0.0.1:{port}/{num_bytes}", timeout=300, trust_env=False)
    print("answered", answer.status_code, len(answer.content))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
