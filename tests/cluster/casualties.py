"""Kill or stop processes of the shared Ray while clients ask for images, and measure the damage.

`strike` sends the signal and waits until everything is replaced; `clients` asks meanwhile.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import psutil

from tests.cluster.conftest import BOOT_S, PATIENCE_S, are_running, wait_until
from tests.cluster.groups import TIER
from tests.cluster.storm import PROMPT

# Ray's names of the actors' classes. `leader`, and `rank`, which is found by its leader, are those
# of the tier with two ranks.
CLASSES = {
    "gateway": "ServeReplica:gateway:gateway",
    "ledger": "LedgerActor",
    "lone leader": "ServeReplica:tiny:tiny",
    "leader": f"ServeReplica:{TIER}:{TIER}",
    "text encoder": f"ServeReplica:{TIER}:{TIER}-text-encoder",
    "controller": "ServeController",
    "proxy": "ProxyActor",
}
TIERS = ("tiny", TIER)
PAUSE_S = 0.3


def processes_of(kind: str) -> list[psutil.Process]:
    """Return the live processes of a kind of CLASSES, or of kind `rank`."""
    from ray._private.state import state

    alive = state.actor_table(None, actor_state_name="ALIVE").values()
    actors: list[dict[str, Any]] = [each for each in alive if psutil.pid_exists(each["Pid"])]
    if kind == "rank":
        leaders = [each["Address"] for each in of_class("leader", actors)]
        found = [each for each in actors if each["OwnerAddress"] in leaders]
    else:
        found = of_class(kind, actors)
    return [psutil.Process(each["Pid"]) for each in found]


def of_class(kind: str, actors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in actors if each["ActorClassName"] == CLASSES[kind]]


@dataclass(frozen=True)
class Answer:
    """The answer to one request for an image; status 0 if the connection failed."""

    tier: str
    began_at: float
    ended_at: float
    status: int

    @property
    def is_image(self) -> bool:
        return self.status == 200


@dataclass
class Clients:
    """Clients, one for each tier, that ask for an image again and again."""

    address: str
    answers: list[Answer] = field(default_factory=list)
    has_ended: threading.Event = field(default_factory=threading.Event)

    def ask(self, tier: str) -> None:
        fields = {"model": tier, "prompt": PROMPT, "seed": 1}
        while not self.has_ended.is_set():
            began = time.monotonic()
            try:
                url = f"{self.address}/v1/images/generations"
                status = httpx.post(url, json=fields, timeout=PATIENCE_S).status_code
            except httpx.TransportError:
                status = 0
            self.answers.append(Answer(tier, began, time.monotonic(), status))
            self.has_ended.wait(PAUSE_S)

    def images(self, tier: str) -> list[Answer]:
        return [each for each in list(self.answers) if each.tier == tier and each.is_image]


@contextmanager
def clients(address: str) -> Iterator[Clients]:
    """Let clients ask for images during the `with`, which begins when each has its first one."""
    asking = Clients(address)
    threads = [threading.Thread(target=asking.ask, args=(tier,)) for tier in TIERS]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(map(asking.images, TIERS)), timeout_s=BOOT_S, what="first images")
        yield asking
    finally:
        asking.has_ended.set()
        for thread in threads:
            thread.join()


@dataclass(frozen=True)
class Casualty:
    """What became of a cluster after some processes were killed or stopped.

    `gone_s`: seconds until the processes were gone. `next_image_s`: until every tier had answered a
    request from after the signal. `longest_gap_s`: the longest time without an image of one tier.
    """

    what: str
    gone_s: float
    next_image_s: float
    longest_gap_s: float
    num_images: int
    num_failed: int

    def __str__(self) -> str:
        return (
            f"| {self.what} | {self.gone_s:.1f} | {self.next_image_s:.1f}"
            f" | {self.longest_gap_s:.1f} | {self.num_images} | {self.num_failed} |"
        )


COLUMNS = ("what", "gone, s", "next image, s", "longest gap, s", "images", "failed")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def strike(asking: Clients, kinds: tuple[str, ...], sent: signal.Signals) -> Casualty:
    """Send a signal to one process of each kind, and wait until all of them are replaced."""
    struck = [processes_of(kind)[-1] for kind in kinds]
    before = {kind: set(processes_of(kind)) for kind in kinds}
    number, began = len(asking.answers), time.monotonic()
    for process in struck:
        process.send_signal(sent)
    _, alive = psutil.wait_procs(struck, timeout=PATIENCE_S)
    gone_s = time.monotonic() - began
    assert not alive, f"{alive} were never ended"

    def next_images() -> list[float]:
        firsts = (
            next((a.ended_at for a in asking.images(tier) if a.began_at > began), None)
            for tier in TIERS
        )
        return [at - began for at in firsts if at is not None]

    wait_until(lambda: len(next_images()) == len(TIERS), timeout_s=BOOT_S, what="images again")
    wait_until_whole(before)
    later = asking.answers[number:]
    return Casualty(
        f"{' and '.join(kinds)} by {sent.name}",
        gone_s,
        max(next_images()),
        max(longest_gap_s(asking.images(tier), began) for tier in TIERS),
        sum(each.is_image for each in later),
        sum(not each.is_image for each in later),
    )


def wait_until_whole(before: dict[str, set[psutil.Process]]) -> None:
    """Wait until there are as many processes as before, and Serve calls everything RUNNING."""
    from ray import serve

    def is_whole() -> bool:
        return all(len(processes_of(kind)) >= len(those) for kind, those in before.items())

    wait_until(is_whole, timeout_s=BOOT_S, what="as many processes as before")
    wait_until(lambda: are_running(serve.status()), timeout_s=BOOT_S, what="every tier")


def longest_gap_s(images: list[Answer], began: float) -> float:
    """Return the longest time between two images after `began`, or from `began` to the first."""
    ends = [began, *(each.ended_at for each in images if each.ended_at > began)]
    return max((later - earlier for earlier, later in pairwise(ends)), default=0.0)
