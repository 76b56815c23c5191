"""The HTTP server of a service: uvicorn, with connections of our own, and an end in three steps.

Ctrl-C, or SIGTERM, first: nothing new is taken, and answers that run may end. After `Limits.grace_seconds`, or with a
second signal of either kind: what still runs is told that the server stops. Then the process ends; after a second
signal within `_HURRY_SECONDS` seconds, also where the engine is busy with a model or a file.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from .connections import connections_within
from .guard import App
from .service import Service

_LAST_WORDS = 1.0  # seconds that connections have once their requests are ended
_HURRY_SECONDS = 2.0  # and that the whole process has after a second signal


class HttpServer(uvicorn.Server):
    """Serves `app`, the application of `service`, and calls `on_start` once it does.

    `should_exit = True` stops it from another thread.
    """

    def __init__(self, app: App, service: Service, on_start: Callable[[], None] = lambda: None):
        self._service, self._on_start = service, on_start
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=connections_within(limits),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # the service's log is enough, and quotes nobody
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=round(limits.grace_seconds + _LAST_WORDS),
                h11_max_incomplete_event_size=limits.header_bytes,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        ending = asyncio.get_running_loop().call_later(self._service.limits.grace_seconds, self._service.end)
        await super().shutdown(sockets)
        ending.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again, hurries = self.should_exit, self.force_exit
        super().handle_exit(sig, frame)
        if again and not hurries:
            self.force_exit = True
            self._service.end()
            # Files are renamed when they are whole, so none is lost.
            ending = threading.Timer(_HURRY_SECONDS, os._exit, (128 + sig,))
            ending.daemon = True
            ending.start()


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. OSError where the address is in use, or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except BaseException:
        listening.close()
        raise
    return listening


def run(app: App, service: Service, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, and then do what those do elsewhere: Ctrl-C raises KeyboardInterrupt."""
    try:
        HttpServer(app, service, on_start).run([listening])
    finally:
        service.close()
