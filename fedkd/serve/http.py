"""The server: uvicorn, less patient."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedkd.core.errors import UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; a port of 0 is any that is free.

    Raises:
        UsageError: the port is in use, or there is no such address on this machine.

    """
    try:
        # With its protocol named, since asyncio turns off Nagle's algorithm for such only: else an answer takes 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter for names that cannot be
        raise _unusable(host, port, error) from error
    try:
        if sys.platform != "win32":  # where it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise _unusable(host, port, error) from error
    return listening


def _unusable(host: str, port: int, error: Exception) -> UsageError:
    reason = str(getattr(error, "strerror", None) or error).lower()
    return UsageError(f"Cannot listen on port {port} of {host} ({reason}); choose another.")


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
