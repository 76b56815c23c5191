"""The page at `/` to try the server with. Its files need no build and no other host."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/answer.js": ("answer.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/plan.js": ("plan.js", "text/javascript"),
}
PAGE_PATHS = tuple(_PAGE_FILES)

# The page runs its own script alone, asks this server alone, and nobody may put it into a frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page's files, which belong to the package."""
    return [_route(path, name, kind) for path, (name, kind) in _PAGE_FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    content = (Path(__file__).parent / "page" / name).read_bytes()

    async def file(request: HTTPRequest) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return Route(path, file)
