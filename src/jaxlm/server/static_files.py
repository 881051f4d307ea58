"""The files of the chat page at `/`. They need no API key, because they contain no secret."""

import hashlib
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
# Not from the module mimetypes, which reads tables of the machine: browsers refuse scripts of another type.
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page loads nothing from elsewhere. trusted-types: assigning a text to innerHTML raises an error, so that the text
# of a model cannot become markup.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser asks each time, and gets 304 if its ETag is current
}


def page_routes() -> list[Route]:
    """A route per file. Reads the files."""
    return [_route(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES]


def is_page(scope: Scope) -> bool:
    """Whether a request only reads a file of the page."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))


def _route(path: Path) -> Route:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def get(http: HttpRequest) -> Response:
        if etag in http.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[path.suffix])

    return Route("/" if path.name == "index.html" else f"/page/{path.name}", get)
