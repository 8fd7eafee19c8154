"""URLs of jobs' pictures: whoever has one may read that picture, for a while."""

import hmac
import re
import time
from collections.abc import Callable

from flux_ray.jobs.job import Job, StoredImage
from flux_ray.jobs.service import JobService

PREFIX = "/results/"
VALID_S = 600
_EXPIRY = re.compile(r"[0-9]{1,12}", re.A)
_SIGNATURE = re.compile(r"[0-9a-f]{64}", re.A)


class ResultUrls:
    """Makes them and checks them. `secret` is the desk's, so that any gateway knows all of them."""

    def __init__(
        self,
        public_url: str,
        secret: bytes,
        valid_s: float = VALID_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._public_url = public_url.rstrip("/")
        self._secret = secret
        self._valid_s = valid_s
        self._clock = clock

    def url_of(self, picture: StoredImage) -> str:
        """Absolute, and good from now on for so long as they are."""
        expiry = str(int(self._clock() + self._valid_s))
        signature = self._sign(picture.name, expiry)
        return f"{self._public_url}{PREFIX}{picture.name}?exp={expiry}&sig={signature}"

    def allows(self, name: str, expiry: str, signature: str) -> bool:
        """Whether it is one of ours, for that very name, and not yet over."""
        if not _EXPIRY.fullmatch(expiry) or not _SIGNATURE.fullmatch(signature):
            return False
        is_ours = hmac.compare_digest(self._sign(name, expiry), signature)
        return is_ours and self._clock() < int(expiry)

    def _sign(self, name: str, expiry: str) -> str:
        # What else is ever signed with this secret has other words in front.
        words = f"result {expiry} {name}".encode("utf-8", "backslashreplace")
        return hmac.digest(self._secret, words, "sha256").hex()


async def urls_for(desk: JobService, public_url: str) -> ResultUrls:
    """With the secret that all gateways share. Raises StoreLost."""
    return ResultUrls(public_url, await desk.url_secret())


def sample_url_of(job: Job, urls: ResultUrls) -> str | None:
    """Where the first picture of a job is, if it is ready."""
    if job.status != "ready" or job.result is None:
        return None
    return urls.url_of(job.result.pictures[0])


def preview_url_of(job: Job, urls: ResultUrls) -> str | None:
    """Where what it will look like is, if it runs and that is known."""
    return None if job.preview is None else urls.url_of(job.preview)
