"""Processes for tests of rank groups: started once, they meet anew for every test.

`run_ranks(parallel, function, *args)` calls `function(mesh, *args)` on every rank of a group and
returns what the ranks returned, in order. The function may be a test's own: it travels by value.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ray import cloudpickle

from flux_ray.config.tier import Parallel

PATIENCE_S = 600
MEETING_S = 300.0
# What the process has imported of which all ranks are forks: in each it would take eight seconds.
# The one thread that runs by then is numpy's, whose OpenBLAS starts it anew after a fork.
IMPORTED = ("flux_ray.engine.registry", "flux_ray.parallel.lora", "pytest", "ray.cloudpickle")


class RankFailed(AssertionError):
    """The traceback of a rank."""


class Ranks:
    """A pool of processes that have imported torch and diffusers already."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(self, parallel: Parallel, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._grow(parallel.num_ranks)
        pipes = [pipe for _, pipe in self._workers[: parallel.num_ranks]]
        job = cloudpickle.dumps((function, args))
        pipes[0].send(("open", None))
        endpoint = self._answer(pipes[0])
        for rank, pipe in enumerate(pipes):
            pipe.send(("run", (rank, parallel, endpoint, job)))
        return [self._answer(pipe) for pipe in pipes]

    def _answer(self, pipe: Connection) -> Any:
        # After a failure the others hang in a collective: they are of no use any more.
        if not pipe.poll(self._patience_s):
            self.close()
            raise RankFailed(f"a rank did not answer within {self._patience_s} s")
        error, value = pipe.recv()
        if error:
            self.close()
            raise RankFailed(error)
        return cloudpickle.loads(value)

    def _grow(self, num_ranks: int) -> None:
        while len(self._workers) < num_ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()


def work(pipe: Connection) -> None:
    """A process of the pool."""
    import torch
    import torch.distributed as dist

    from flux_ray.parallel.mesh import Endpoint, connect_store, join_mesh, open_store

    torch.set_num_threads(1)
    store = None
    while True:
        command, payload = pipe.recv()
        try:
            if command == "open":
                store = open_store("127.0.0.1", MEETING_S)
                answer: Any = Endpoint("127.0.0.1", store.port)
            else:
                rank, parallel, endpoint, job = payload
                function, args = cloudpickle.loads(job)
                met = store if rank == 0 else connect_store(endpoint, MEETING_S)
                mesh = join_mesh(met, rank, parallel, "cpu", MEETING_S)
                answer = function(mesh, *args)
                if dist.is_initialized():
                    dist.barrier()
                    dist.destroy_process_group()
            pipe.send((None, cloudpickle.dumps(answer)))
        except BaseException:  # noqa: BLE001 - the test that asked raises it
            pipe.send((traceback.format_exc(), None))
