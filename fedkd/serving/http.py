"""The server: uvicorn, less patient."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedkd.errors import UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; a port of 0 is any that is free.

    Raises:
        UsageError: somebody else has the port, or there is no such address here.

    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # the latter for names that cannot be
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0].lower()
        raise UsageError(f"Cannot listen on port {port} of {host} ({reason}); choose another.") from error


def server(app: Starlette, timeout: float) -> uvicorn.Server:
    """A server that runs until Ctrl-C or SIGTERM, then answers what it has accepted, and only then obeys."""

    class Impatient(H11Protocol):
        """A connection on which a request must begin within the timeout, or twice that; uvicorn waits for ever."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.timer = self.loop.call_later(timeout, self.look)

        def look(self, seen: object = None) -> None:
            if (self.cycle is None or self.cycle.response_complete) and self.cycle is seen:
                self.transport.close()
            else:
                self.timer = self.loop.call_later(timeout, self.look, self.cycle)

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        loop="asyncio",
        log_level="error",  # a bug of ours, and nothing that others can cause
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout) + 10,
    )
    return uvicorn.Server(config)
