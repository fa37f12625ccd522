"""The server: uvicorn with timeouts for connections."""

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

MAX_CONNECTIONS = 900  # further ones are closed at once; 1024 open files are the usual limit of a process


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free port.

    Raises:
        UsageError: the port is in use, or there is no such address on this machine.

    """
    try:
        # asyncio turns off Nagle's algorithm only if the protocol is given; with it a response takes 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError for invalid host names
        raise _unusable(host, port, error) from error
    try:
        if sys.platform != "win32":  # on Windows it lets two servers share a port
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
    """A server that stops on Ctrl-C or SIGTERM, after all accepted requests have been answered."""

    class TimedProtocol(H11Protocol):
        """A connection that is closed if no request begins within one to two timeouts; uvicorn has no such limit."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.timer = self.loop.call_later(timeout, self.close_if_idle)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.close()

        def close_if_idle(self, last_cycle: object = None) -> None:
            if (self.cycle is None or self.cycle.response_complete) and self.cycle is last_cycle:
                self.transport.close()
            else:
                self.timer = self.loop.call_later(timeout, self.close_if_idle, self.cycle)

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        loop="asyncio",
        log_level="error",  # requests of clients cannot cause messages of this level
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(2 * timeout) + 10,
    )
    return uvicorn.Server(config)
