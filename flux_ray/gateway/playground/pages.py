"""Serve the playground at `/`, the description of the API at `/docs`, and the files of both.

The pages are plain files of this package: no build, no other host, no inline script or style. They
are read once, hold no secrets and need no key; the scripts on them call the routes of the API like
any other client. `PageRoutes` serves them; `is_page` tells the middleware which paths they have.
"""

import gzip
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"
# Below this prefix are the scripts, the style sheet and the icon.
PREFIX = "/playground/"
PAGES = {"/": "playground.html", "/docs": "docs.html"}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Prompts and keys are typed into these pages: nothing may run in them, be sent from them or show
# them in a frame, but for what this gateway serves. References are shown from memory (`blob:`).
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time, which costs a 304: after an upgrade nobody runs old scripts.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


class PageFile(NamedTuple):
    """A file as it is sent: plain, packed with gzip, and named by its content."""

    media_type: str
    plain: bytes
    packed: bytes
    tag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Return all files of the pages by name."""
    return {path.name: page_file(path) for path in sorted(FOLDER.iterdir())}


def page_file(path: Path) -> PageFile:
    """Read one file. Raise KeyError for a type that no page needs."""
    data = path.read_bytes()
    # Without a time in it, each gateway packs the same bytes.
    packed = gzip.compress(data, mtime=0)
    return PageFile(TYPES[path.suffix], data, packed, sha256(data).hexdigest()[:20])


def is_page(path: str) -> bool:
    """Return whether a path is that of a page or of one of its files."""
    return path in PAGES or path.startswith(PREFIX)


class PageRoutes:
    """The routes of the pages, for GET and HEAD. OpenAPI does not list them."""

    def __init__(self) -> None:
        self._files = page_files()

    def routes(self) -> APIRouter:
        """Return the routes of both pages and of their files."""
        routes = APIRouter()
        for path, endpoint in (
            ("/", self.show_playground),
            ("/docs", self.show_docs),
            (PREFIX + "{name}", self.show_file),
        ):
            methods = ["GET", "HEAD"]
            routes.add_api_route(path, endpoint, methods=methods, include_in_schema=False)
        return routes

    async def show_playground(self, request: Request) -> Response:
        """Return the playground."""
        return self._answer(request, PAGES["/"])

    async def show_docs(self, request: Request) -> Response:
        """Return the description of the API."""
        return self._answer(request, PAGES["/docs"])

    async def show_file(self, request: Request, name: str) -> Response:
        """Return a script, the style sheet or the icon."""
        if name not in self._files or name in PAGES.values():
            # Else each page would have a second address, where its links lead nowhere.
            raise HTTPException(404)
        return self._answer(request, name)

    def _answer(self, request: Request, name: str) -> Response:
        file = self._files[name]
        is_packed = "gzip" in request.headers.get("accept-encoding", "")
        tag = f'"{file.tag}-gzip"' if is_packed else f'"{file.tag}"'
        headers = HEADERS | {"etag": tag}
        known = request.headers.get("if-none-match", "").replace("W/", "")
        if tag in (each.strip() for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        if is_packed:
            headers["content-encoding"] = "gzip"
        body = file.packed if is_packed else file.plain
        return Response(body, media_type=file.media_type, headers=headers)
