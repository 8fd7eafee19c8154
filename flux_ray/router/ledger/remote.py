"""The proxy through which other processes call the ledger's actor, and start and end it.

`RemoteLedger` is the proxy, and `start_ledger` finds or starts the actor.
"""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flux_ray.request import PROTOCOL
from flux_ray.router.background import SharedCall
from flux_ray.router.ledger.actor import LISTEN_S, LedgerActor
from flux_ray.router.ledger.hung_processes import (
    END,
    LOOK,
    LOOKING_S,
    STILL_S,
    SUSPECT_S,
    find_process,
    locate,
    watch_processes,
)
from flux_ray.router.ledger.placement import chosen_node, leave_drained_node
from flux_ray.router.ledger.service import LEDGER_BACK_S, LedgerLost

logger = logging.getLogger("ray.serve")

# Code of another protocol has a ledger of its own: while a cluster is upgraded both live, and the
# old one ends when nobody has called it for a while.
NAME = f"flux-ray-ledger-{PROTOCOL}"
NAMESPACE = "flux-ray"
ANSWER_S = 5.0
# For what is asked before a request is submitted, which can do without an answer.
FORECAST_S = 1.0
# A gateway without an answer for so long is cut off from the cluster: a ledger that died or hangs
# would have been replaced.
LOST_S = LEDGER_BACK_S
# A ledger that leaves this many calls in a row unanswered hangs.
MAX_UNANSWERED = 2
# If a time limit ends this much too late, it was this process that stood still and read no answers,
# and the ledger must not be killed for it.
LAG_S = 1.0


P = ParamSpec("P")
T = TypeVar("T")


def remote_call(
    method: Callable[Concatenate[LedgerActor, P], Coroutine[Any, Any, T]],
    waits_s: float = 0.0,
    at_most_s: float = math.inf,
) -> Callable[Concatenate["RemoteLedger", P], Coroutine[Any, Any, T]]:
    """Make the proxy's method of a method of the ledger, with its types.

    `waits_s`: how long the ledger itself may take before it answers. `at_most_s`: how long the
    caller waits, if that is less than the proxy's own limit.
    """
    name = method.__name__

    async def call(line: "RemoteLedger", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = await line.call(min(waits_s + line.answer_s, at_most_s), name, *args, **kwargs)
        return answer

    return call


class RemoteLedger:
    """Call the ledger's actor, from any process; a `LedgerService`.

    The first call anywhere starts the actor. `answer_s`: how long a call waits before LedgerLost.
    A process that leaves a call unanswered and stands still is ended, and so is the actor after
    several calls without an answer; Ray starts it anew.
    """

    def __init__(
        self,
        start: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.answer_s = answer_s
        self._start = start or start_ledger
        self._clock = clock
        # When the first of the calls began that have failed since the last answer; None if none.
        self._failing_since_s: float | None = None
        self._actor: Any = None
        self._num_answers = 0
        self._num_unanswered = 0
        self._look: asyncio.Task[None] | None = None
        # A thread of its own: its calls block while Ray's head is away, and would take up all the
        # threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._starting = SharedCall(self._thread, self._start)

    def is_heard(self) -> bool:
        """Return whether the ledger answers, or may soon: one that died is back within seconds.

        A gateway calls it twice a second, so that it counts as heard again with its first answer.
        """
        since_s = self._failing_since_s
        return since_s is None or self._clock() - since_s < LOST_S

    say = remote_call(LedgerActor.say)
    listen = remote_call(LedgerActor.listen, waits_s=LISTEN_S)
    forecast = remote_call(LedgerActor.forecast, at_most_s=FORECAST_S)
    places = remote_call(LedgerActor.places, at_most_s=FORECAST_S)
    backlog = remote_call(LedgerActor.backlog)
    share_prices = remote_call(LedgerActor.share_prices)
    enter = remote_call(LedgerActor.enter)
    leave = remote_call(LedgerActor.leave)
    share_usage = remote_call(LedgerActor.share_usage)

    async def call(self, timeout_s: float, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the actor. Raise LedgerLost if it does not answer in time."""
        began_s = self._clock()
        try:
            answer = await self._answer(timeout_s, method, args, kwargs)
        except LedgerLost:
            if self._failing_since_s is None:
                self._failing_since_s = began_s
            raise
        self._failing_since_s = None
        return answer

    async def _answer(
        self, timeout_s: float, method: str, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        began_s = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                actor = await self._connected()
                # The ledger itself may take its time for what is given more than `answer_s`.
                with self._suspecting(max(0.0, timeout_s - self.answer_s) + SUSPECT_S):
                    answer = await called(actor, method, args, kwargs)
        except TimeoutError as error:
            # A call that is given less time says nothing: the ledger may only be slow.
            if self.answer_s <= timeout_s and self._clock() - began_s < timeout_s + LAG_S:
                self._note_silence()
            raise LedgerLost(f"{method}: no answer within {timeout_s:g} s") from error
        except (RayError, ValueError) as error:
            # It died or is ending: ask by name again, which finds or starts one that lives.
            self._actor, self._num_unanswered = None, 0
            raise LedgerLost(f"{method}: {error}") from error
        self._num_unanswered = 0
        self._num_answers += 1
        return answer

    async def _connected(self) -> Any:
        """Return the ledger's handle; while Ray's head is away, all callers wait for one call."""
        if self._actor is None:
            self._actor = await self._starting.result()
            # What was unanswered until now was so because there was nobody to ask.
            self._num_unanswered = 0
        return self._actor

    @contextmanager
    def _suspecting(self, after_s: float) -> Iterator[None]:
        """Look at the ledger's process if the call within is not answered after so long."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(after_s, self._suspect, loop.time() + after_s)
        try:
            yield
        finally:
            timer.cancel()

    def _suspect(self, due_s: float) -> None:
        loop = asyncio.get_running_loop()
        # Who comes late stood still itself, and has not read the answers.
        if self._look is None and loop.time() < due_s + LAG_S:
            # In an empty context: otherwise Ray would cancel it with the request that waits.
            look = self._end_if_still(self._actor)
            self._look = loop.create_task(look, context=contextvars.Context())

    async def _end_if_still(self, actor: Any) -> None:
        """End the ledger's process on its node if it stands still there; Ray starts it anew."""
        num_before = self._num_answers
        try:
            async with asyncio.timeout(LOOKING_S):
                process = await find_process(actor, self._thread)
                began = await process.beside(LOOK, STILL_S, thread=self._thread)
                # It may have answered meanwhile.
                if began is not None and self._num_answers == num_before:
                    logger.error("the ledger hangs, and is started anew")
                    await process.beside(END, began, thread=self._thread)
        except (RayError, TimeoutError) as error:
            logger.info("the ledger is silent, and cannot be looked at: %s", error)
        finally:
            self._look = None

    def _note_silence(self) -> None:
        """Count an unanswered call, and kill a ledger that hangs: it would not end by itself."""
        self._num_unanswered += 1
        if self._actor is not None and self._num_unanswered >= MAX_UNANSWERED:
            self._num_unanswered = 0
            self._thread.submit(kill_hung, self._actor)


def called(actor: Any, method: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
    """Call a method of the ledger; LedgerLost if its code is too old or too new to have it.

    One that is found by its name may have been started by another build of the same PROTOCOL.
    """
    try:
        return getattr(actor, method).remote(*args, **kwargs)
    except (AttributeError, TypeError) as error:
        raise LedgerLost(f"{method}: the ledger is of another version: {error}") from error


def kill_hung(actor: Any) -> None:
    """Kill a ledger that hangs, so that Ray starts it anew under the same handle. Blocks.

    One that is still starting answers nothing either. Without this check, gateways on a busy node
    would end each new ledger before it was up.
    """
    if locate(actor) is None:
        logger.info("the ledger is starting, and does not answer yet")
        return
    logger.error("the ledger hangs, and is started anew")
    ray.kill(actor, no_restart=False)


def start_ledger() -> Any:
    """Return the ledger's handle; start the actor if there is none. Blocks.

    It requires no CPUs: where tiers have taken them all, it could not start, and nothing would go
    on. All the same it is put on a node that has some: a head that offers none is not for work.
    """
    remote: Any = ray.remote
    actor = remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(LedgerActor)
    return actor.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        # Soft: it may start anew on another node when this one is gone.
        scheduling_strategy=NodeAffinitySchedulingStrategy(chosen_node(), soft=True),
    ).remote(companion=accompany)


async def accompany() -> None:
    """Do beside the ledger what the cluster needs done once, until a part of it fails."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch_processes())
        tasks.create_task(leave_drained_node())
