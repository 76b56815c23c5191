"""Who may ask: the key, the Host and the Origin of a request.

A page in a browser can reach this server though it is on the loopback address. Its requests have the page's Origin,
and where its own name was made to lead here (DNS rebinding) that name as Host.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .faults import CLOSING, ApiError
from .limits import Limits, Receive
from .static import PAGE_PATHS

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOST = re.compile(r"[\w.:\[\]-]+")  # nothing that has a meaning elsewhere in an address
_OPEN = ("/health", *PAGE_PATHS)  # what is told without a key
_ALLOWED_METHODS, _PREFLIGHT_SECONDS = "GET, POST, OPTIONS", "600"


class Origins:
    """The pages of other hosts that may ask, by their origin; "*" is all."""

    def __init__(self, origins: Collection[str]):
        self._origins = {origin.rstrip("/").lower() for origin in origins}

    def __contains__(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins


class Cors:
    """Tells browsers that pages of `origins` may read what `app` answers, errors too."""

    def __init__(self, app: App, origins: Origins):
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers_of(scope)
        origin = headers.get("origin")
        if origin is not None and origin in self._origins:
            send = _with_headers(send, {"access-control-allow-origin": origin, "vary": "Origin"})
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _allow(send, headers)
                return
        await self._app(scope, receive, send)


class Guard:
    """Lets those requests through to `app` that may ask; the others get an ApiError.

    `hosts`: names beside "localhost" that this server is called by; addresses always are allowed, as no name was made
    to lead to them. `origins`: pages of other hosts that may ask. `key`: what clients must know.
    """

    def __init__(self, app: App, *, hosts: Collection[str], origins: Origins, key: str | None, limits: Limits):
        self._app, self._key, self._limits = app, None if key is None else key.encode(), limits
        self._hosts, self._origins = {name.lower() for name in hosts}, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_size(scope)
        headers = _headers_of(scope)
        self._check_host(headers.get("host"))
        self._check_origin(headers.get("origin"), headers.get("host"))
        if self._key is not None and scope["path"] not in _OPEN:
            self._check_key(headers.get("authorization"), self._key)
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > self._limits.header_bytes:
            most = f"{self._limits.header_bytes:,}"
            raise ApiError(431, f"the headers have more than {most} bytes", "headers_too_large", None, CLOSING)

    def _check_host(self, host: str | None) -> None:
        """Only HTTP/1.0, which no browser speaks, leaves the host out."""
        if host is None or "*" in self._hosts:
            return
        name = _name_of(host)
        if name is None or not (name == "localhost" or name in self._hosts or _is_address(name)):
            shown = ascii(host[:80])
            message = f"this server is not called {shown}; start it with --allowed-host, and the name, if it is to be"
            raise ApiError(403, message, "host_not_allowed", None, CLOSING)

    def _check_origin(self, origin: str | None, host: str | None) -> None:
        if origin is None or origin in self._origins:
            return
        if host is not None and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return
        message = f"pages of {origin[:80]!a} may not ask this server; start it with --cors-origin if they are to"
        raise ApiError(403, message, "origin_not_allowed", None, CLOSING)

    def _check_key(self, given: str | None, key: bytes) -> None:
        scheme, _, token = (given or "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), key):
            return
        message = "the API key is wrong" if given else "no API key was given; send Authorization: Bearer and the key"
        raise ApiError(401, message, "invalid_api_key", None, {**CLOSING, "WWW-Authenticate": "Bearer"})


def _headers_of(scope: Scope) -> dict[str, str]:
    """By their names; one that is given twice has all its values, as HTTP joins them, and so equals none of them."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


def _name_of(host: str) -> str | None:
    """The name in "name:port", in lower case; None if it is no such thing."""
    if not _HOST.fullmatch(host):
        return None
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    lines = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *lines]}
        await send(message)

    return with_headers


async def _allow(send: Send, headers: Mapping[str, str]) -> None:
    """Answer a browser that asks whether a page may ask."""
    lines = {
        "access-control-allow-methods": _ALLOWED_METHODS,
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": _PREFLIGHT_SECONDS,
    }
    if "access-control-request-private-network" in headers:  # Chrome asks so of an address like 127.0.0.1
        lines["access-control-allow-private-network"] = "true"
    sent = [(name.encode(), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": 204, "headers": sent})
    await send({"type": "http.response.body", "body": b""})
