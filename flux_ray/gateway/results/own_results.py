"""References that are this server's own results: read from their store, without the network."""

from urllib.parse import parse_qs, urlsplit

from flux_ray.errors import BadReference
from flux_ray.gateway.images.addresses import MAX_URL_CHARS
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.gateway.results.urls import PREFIX, urls_for
from flux_ray.jobs.results import ResultMissing, ResultTooLarge
from flux_ray.jobs.service import JobService


class OwnResultsFirst(Fetcher):
    """A Fetcher that knows the URLs which this server signs.

    A signature is of the result's name alone, so that by whatever host clients reach this server
    (localhost, a private `public_url`, a load balancer), the URL is its own, and nobody else's.
    """

    def __init__(self, fetcher: Fetcher, desk: JobService, public_url: str) -> None:
        # Those of the other: reading the certificates takes a while.
        self.fetching, self.guard = fetcher.fetching, fetcher.guard
        self._fetcher = fetcher
        self._desk = desk
        self._public_url = public_url.rstrip("/")

    async def read(self, url: str, max_bytes: int, name: str, until_s: float) -> bytes:
        """The bytes of an own result, else as the Fetcher. Raises StoreLost too."""
        result = await self._result_of(url)
        if result is None:
            if url.startswith(self._public_url + PREFIX):
                message = f"{name}: its URL is none of this server's results, or not any more"
                raise BadReference(message, "url")
            return await self._fetcher.read(url, max_bytes, name, until_s)
        try:
            data = await self._desk.read_by_name(result)
        except (ResultMissing, ResultTooLarge):
            message = f"{name}: the result at its URL is not kept any more"
            raise BadReference(message, "url") from None
        if len(data) > max_bytes:
            raise BadReference(f"{name} is larger than {max_bytes} bytes", "url")
        return data

    async def _result_of(self, url: str) -> str | None:
        """The name of the result, if the URL is signed by this server and still good."""
        if len(url) > MAX_URL_CHARS:
            # Python keeps the last 128 URLs that it split, each as long as a body may be.
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
        urls = await urls_for(self._desk, self._public_url)
        return name if urls.allows(name, exp, sig) else None
