"""Who may ask: API keys, and that no web page drives a server on the loopback interface.

A page that a browser shows can send requests to 127.0.0.1 too. Two things give it away: its `Origin`, and, where a
name that it controls was made to point here (DNS rebinding), a `Host` that is none of ours. And without asking first, a
browser sends no JSON content type, so bodies must have one.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.runtime.settings.address import is_loopback
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

OPEN_PATHS = ("/health", "/", "/static/")  # need no key: probes, and the page, which asks for it
ALLOW = [
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta"),
    (b"access-control-max-age", b"600"),
]


class Guard:
    def __init__(self, args: ServerArgs) -> None:
        self._keys = [args.api_key.encode()] if args.api_key else []
        self._origin = args.cors_origin
        self._loopback = is_loopback(args.host)

    def check(self, exchange: Exchange) -> None:
        """Raises ApiError: 403 for a page of another origin, 401 without the key, 415 for a body that is no JSON."""
        host, origin = exchange.header(b"host"), exchange.header(b"origin")
        if self._loopback and not is_loopback(_host_name(host)):
            raise ApiError(403, f"Host {host!r} is not this machine: ask 127.0.0.1 or localhost", code="bad_host")
        if origin:
            self._check_origin(exchange, origin, host)
        if self.is_preflight(exchange):
            return  # it brings no key
        if self._keys and not exchange.path.startswith(OPEN_PATHS[2]) and exchange.path not in OPEN_PATHS[:2]:
            self._check_key(exchange)
        if exchange.method == "POST":
            kind = exchange.header(b"content-type").split(";")[0].strip().lower()
            if kind != "application/json" and (kind or exchange.header(b"content-length") not in ("", "0")):
                raise ApiError(415, f"Content-Type is {kind!r}: must be application/json", code="bad_content_type")

    def is_preflight(self, exchange: Exchange) -> bool:
        """Whether a browser asks what a page of the allowed origin may do."""
        return exchange.method == "OPTIONS" and self._origin is not None

    def _check_origin(self, exchange: Exchange, origin: str, host: str) -> None:
        if self._origin is not None and origin == self._origin:
            exchange.extra_headers.append((b"access-control-allow-origin", origin.encode()))
            exchange.extra_headers.append((b"vary", b"origin"))
            if exchange.method == "OPTIONS":
                exchange.extra_headers.extend(ALLOW)
        elif _netloc(origin) != host:
            raise ApiError(
                403, f"pages of {origin} may not call this server: see --cors-origin", code="origin_not_allowed"
            )

    def _check_key(self, exchange: Exchange) -> None:
        given = given_key(exchange).encode("latin-1", "replace")
        if not any(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                401,
                "a valid API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
            )


def given_key(exchange: Exchange) -> str:
    """The key that a request brings, valid or not; "" without one."""
    scheme, _, bearer = exchange.header(b"authorization").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else exchange.header(b"x-api-key")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # no address at all
        return None


def _host_name(host: str) -> str:
    """`Host` without its port; IPv6 without brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
