"""The chat page at /: static files of this package, and nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from maestrale.serve.context import Context
from maestrale.serve.problems import ApiError

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# No script but these files runs, and none may write HTML from text (trusted types); no other host is ever asked.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


async def page(context: Context, request: Request) -> Response:
    """The page itself, or the file of it that the path names."""
    name = request.path_params.get("name", "index.html")
    found = next((file for file in files("maestrale.serve").joinpath("page").iterdir() if file.name == name), None)
    if found is None:
        raise ApiError(404, "no such file of the page")
    kind = _KINDS[name.rpartition(".")[2]]
    return Response(await context.in_worker(found.read_bytes), media_type=kind, headers=_HEADERS)
