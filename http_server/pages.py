"""`/` and its files: a page for people, without a build step and without anything from elsewhere."""

from __future__ import annotations

from importlib import resources

from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.service import Service

TYPES = {
    "css": b"text/css; charset=utf-8",
    "html": b"text/html; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
}
# Nothing but this server's own files runs in the page, and no other page may frame it.
POLICY = b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


async def page(service: Service, exchange: Exchange) -> None:
    name = exchange.path.removeprefix("/static/").lstrip("/") or "index.html"
    file = resources.files("vibe_sgl_lite.http_server").joinpath("static", name)
    kind = TYPES.get(name.rpartition(".")[2])
    if "/" in name or "\\" in name or kind is None or not file.is_file():
        raise ApiError(404, f"there is no {exchange.path} here", code="not_found")
    exchange.extra_headers += [(b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff")]
    await exchange.answer(file.read_bytes(), content_type=kind)
