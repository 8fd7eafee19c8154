"""Serve finished images by signed URLs, and read them back when they are sent as references.

`ResultUrls` signs and checks the URLs: whoever has one may read that image until it expires.
`KeptImages` stores images that were generated without a job, for as long as those of jobs.
`ResultRoutes` is `GET /results/...`. `OwnResultsFirst` reads references that are this server's own
results from the store, without the network.
"""

import hmac
import re
import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.errors import BadReference, UnknownResult
from flux_ray.gateway.errors import Envelope, answer_for
from flux_ray.gateway.images.fetch import MAX_URL_CHARS, Fetcher
from flux_ray.jobs.images import ResultMissing, ResultTooLarge
from flux_ray.jobs.job import Job, StoredImage
from flux_ray.jobs.service import JobService
from flux_ray.request import ImageRequest, ImageResult

PREFIX = "/results/"
VALID_S = 600
_EXPIRY = re.compile(r"[0-9]{1,12}", re.A)
_SIGNATURE = re.compile(r"[0-9a-f]{64}", re.A)


class ResultUrls:
    """Signs URLs of results and checks them.

    All gateways of a database share `secret`, so that each accepts the URLs of the others.
    """

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

    def url_of(self, image: StoredImage) -> str:
        """Return the absolute URL of an image; it is valid for `valid_s` from now on."""
        expiry = str(int(self._clock() + self._valid_s))
        signature = self._sign(image.name, expiry)
        return f"{self._public_url}{PREFIX}{image.name}?exp={expiry}&sig={signature}"

    def allows(self, name: str, expiry: str, signature: str) -> bool:
        """Return whether the signature is ours, for this name and expiry, and has not expired."""
        if not _EXPIRY.fullmatch(expiry) or not _SIGNATURE.fullmatch(signature):
            return False
        is_ours = hmac.compare_digest(self._sign(name, expiry), signature)
        return is_ours and self._clock() < int(expiry)

    def _sign(self, name: str, expiry: str) -> str:
        # Whatever else is ever signed with this secret must begin with other words than `result`.
        words = f"result {expiry} {name}".encode("utf-8", "backslashreplace")
        return hmac.digest(self._secret, words, "sha256").hex()


async def urls_for(job_service: JobService, public_url: str) -> ResultUrls:
    """Return the signer with the secret that all gateways share. Raise StoreLost."""
    return ResultUrls(public_url, await job_service.url_secret())


def sample_url_of(job: Job, urls: ResultUrls) -> str | None:
    """Return the URL of the job's first image, or None if it is not ready."""
    if job.status != "ready" or job.result is None:
        return None
    return urls.url_of(job.result.images[0])


def preview_url_of(job: Job, urls: ResultUrls) -> str | None:
    """Return the URL of the job's latest preview, or None if it has none."""
    return None if job.preview is None else urls.url_of(job.preview)


class KeptImages:
    """Stores images that were generated without a job, where there is a store for those of jobs."""

    def __init__(self, job_service: JobService, public_url: str) -> None:
        self._job_service = job_service
        self._public_url = public_url

    async def urls_of(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[str, ...]:
        """Store the images and return a signed URL of each. Raise StoreLost or ResultsLost."""
        urls = await urls_for(self._job_service, self._public_url)
        images = await self._job_service.keep(owner, request, result)
        return tuple(urls.url_of(image) for image in images)


class OwnResultsFirst(Fetcher):
    """A Fetcher that reads this server's own results from their store.

    The signature covers a result's name and expiry, not the host. So a URL is recognised whatever
    host clients reach this server by (localhost, a private `public_url`, a load balancer), and
    nobody else can make one.
    """

    def __init__(self, fetcher: Fetcher, job_service: JobService, public_url: str) -> None:
        # Taken from the wrapped fetcher, without calling Fetcher's own __init__: reading the
        # certificates again takes a while.
        self.fetching, self.guard = fetcher.fetching, fetcher.guard
        self._fetcher = fetcher
        self._job_service = job_service
        self._public_url = public_url.rstrip("/")

    async def read(self, url: str, max_bytes: int, name: str, until_s: float) -> bytes:
        """Return the bytes of an own result, else what the wrapped fetcher reads.

        Raise BadReference as that does, and StoreLost.
        """
        result = await self._result_of(url)
        if result is None:
            if url.startswith(self._public_url + PREFIX):
                message = f"{name}: its URL is none of this server's results, or not any more"
                raise BadReference(message, "url")
            return await self._fetcher.read(url, max_bytes, name, until_s)
        try:
            data = await self._job_service.read_by_name(result)
        except (ResultMissing, ResultTooLarge):
            message = f"{name}: the result at its URL is not kept any more"
            raise BadReference(message, "url") from None
        if len(data) > max_bytes:
            raise BadReference(f"{name} is larger than {max_bytes} bytes", "url")
        return data

    async def _result_of(self, url: str) -> str | None:
        """Return the result's name if this server signed the URL and it is still valid."""
        if len(url) > MAX_URL_CHARS:
            # Python caches the last 128 URLs that it split; each could be as long as a body.
            return None
        try:
            parts = urlsplit(url)
            query = parse_qs(parts.query, max_num_fields=8)
        except ValueError:
            return None
        _, found, name = parts.path.rpartition(PREFIX)
        exp, sig = (query.get(field, [""])[0] for field in ("exp", "sig"))
        if not found or not sig:
            return None
        urls = await urls_for(self._job_service, self._public_url)
        return name if urls.allows(name, exp, sig) else None


# Types by the ending that we gave the file; the content is not looked at.
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PRIVATE = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}


class ResultRoutes:
    """The one route. It needs no key: the signature is the right to read."""

    def __init__(self, job_service: JobService, public_url: str) -> None:
        self._job_service = job_service
        self._public_url = public_url

    def routes(self) -> APIRouter:
        """Return the route, for any path below the prefix: all wrong URLs get one answer."""
        path = PREFIX + "{name:path}"
        image = {"schema": {"type": "string", "format": "binary"}}
        routes = APIRouter(tags=["results"])
        routes.add_api_route(
            path,
            self.show,
            response_class=Response,
            responses={
                200: {"content": dict.fromkeys(TYPES.values(), image)},
                "default": {"model": Envelope},
            },
        )
        routes.add_api_route(path, self.show, methods=["HEAD"], include_in_schema=False)
        return routes

    async def show(self, request: Request, name: str, exp: str = "", sig: str = "") -> Response:
        """Return the image if its URL is valid and the image is still stored, else a 404."""
        try:
            urls = await urls_for(self._job_service, self._public_url)
            if not urls.allows(name, exp, sig):
                return missing(request)
            data = await self._job_service.read_by_name(name)
        except (ResultMissing, ResultTooLarge):
            return missing(request)
        headers = PRIVATE | {"content-disposition": "inline"}
        return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=headers)


def missing(request: Request) -> Response:
    """Return one answer for everything that may be wrong with a URL; nobody may cache it."""
    error = UnknownResult("there is no such image, or its URL is not valid any more")
    answer = answer_for(request, error)
    answer.headers.update(PRIVATE)
    return answer
