"""Delete a Serve replica in mid-request, and print whether it noticed before it had answered.

The replica answers with two booleans: `is_stopping()` before it is deleted, and while it drains.
This is a program because a process can be connected to only one Ray.
"""

import asyncio
import json
import os

os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray import serve

from flux_ray.app import is_stopping

ANSWER_S = 200


@serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=ANSWER_S)
class Ending:
    def __init__(self) -> None:
        self._has_begun = asyncio.Event()

    async def begin(self) -> None:
        await self._has_begun.wait()

    async def answer_at_the_end(self) -> list[bool]:
        before = is_stopping()
        self._has_begun.set()
        while True:
            if is_stopping():
                return [before, True]
            await asyncio.sleep(0.05)


def main() -> None:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        # By default Ray's workers are so nice that they get no CPU beside any busy process.
        _system_config={"worker_niceness": 0},
    )
    handle = serve.run(Ending.bind(), route_prefix=None)
    answer = handle.answer_at_the_end.remote()
    handle.begin.remote().result(timeout_s=ANSWER_S)
    serve.delete("default", _blocking=False)
    print(json.dumps(answer.result(timeout_s=ANSWER_S)))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
