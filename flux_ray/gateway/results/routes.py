"""`GET /results/...`: finished pictures for whoever has the signed URL of one."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.errors import UnknownResult
from flux_ray.gateway.errors import Envelope, answer_for
from flux_ray.gateway.results.urls import PREFIX, urls_for
from flux_ray.jobs.results import ResultMissing, ResultTooLarge
from flux_ray.jobs.service import JobService

# By the ending that we gave the file; what is in it is not looked at.
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PRIVATE = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}


class ResultRoutes:
    """The one route; it asks for no key, as the signature is the right to read."""

    def __init__(self, desk: JobService, public_url: str) -> None:
        self._desk = desk
        self._public_url = public_url

    def routes(self) -> APIRouter:
        """Whatever the path below it, this answers, so that all that is wrong looks alike."""
        path = PREFIX + "{name:path}"
        picture = {"schema": {"type": "string", "format": "binary"}}
        routes = APIRouter(tags=["results"])
        routes.add_api_route(
            path,
            self.show,
            response_class=Response,
            responses={
                200: {"content": dict.fromkeys(TYPES.values(), picture)},
                "default": {"model": Envelope},
            },
        )
        routes.add_api_route(path, self.show, methods=["HEAD"], include_in_schema=False)
        return routes

    async def show(self, request: Request, name: str, exp: str = "", sig: str = "") -> Response:
        """The picture, if the URL is one of ours and there is still such a picture."""
        try:
            urls = await urls_for(self._desk, self._public_url)
            if not urls.allows(name, exp, sig):
                return missing(request)
            data = await self._desk.read_by_name(name)
        except (ResultMissing, ResultTooLarge):
            return missing(request)
        headers = PRIVATE | {"content-disposition": "inline"}
        return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=headers)


def missing(request: Request) -> Response:
    """One text for all that may be wrong with a URL; not to be remembered by anybody."""
    error = UnknownResult("there is no such picture, or its URL is not valid any more")
    answer = answer_for(request, error)
    answer.headers.update(PRIVATE)
    return answer
