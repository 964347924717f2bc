"""
The server as a process: its socket, slow and silent connections, and an end without broken replies.

    with listen("127.0.0.1", 8000) as listener:
        make_server(app, grace=30).run(sockets=[listener])

The first Ctrl-C (or SIGTERM) begins the end: new replies are refused with 503, those under way get
`grace` seconds. A second one ends it at once.
"""

import asyncio
import errno
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, print0

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI


def listen(host: str, port: int) -> socket.socket:
    """The listening socket. Opened before the model is loaded: a taken port is known at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OverflowError as e:
        raise UserError(f"--port={port}: a port is a number from 0 to 65535") from e
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            message = f"--port={port} is taken by another program; use --port={port + 1}"
        elif e.errno == errno.EACCES:
            message = f"--port={port} is reserved for the system; use one from 1024 up"
        else:
            message = f"--host={host}: {e}; use --host=127.0.0.1 for this machine alone"
        raise UserError(message) from e


def make_server(app: "FastAPI", grace: float, patience: float = 10.0) -> "uvicorn.Server":
    """A uvicorn server that ends gracefully. `grace`: seconds that replies get at the end;
    `patience`: seconds that a connection may take to begin a request."""
    import uvicorn

    class Server(uvicorn.Server):
        drains_since = 0.0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            if not app.state.draining and app.state.pool.num_open > 0:
                app.state.draining, self.drains_since = True, time.monotonic()
                self.should_exit = False  # on_tick says when
                print0(f"ending: replies under way get {grace:g} s (Ctrl-C again ends them)")

        async def on_tick(self, counter: int) -> bool:
            if app.state.draining:
                waited = time.monotonic() - self.drains_since
                if app.state.pool.num_open == 0:
                    self.should_exit = True
                elif waited > grace:
                    # Their clients are told, so uvicorn has nothing to cut
                    await asyncio.to_thread(app.state.pool.shutdown)
                    self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        http=_protocol(patience),
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    return Server(config)


def _protocol(patience: float) -> Any:
    """uvicorn's HTTP protocol, but a connection that sends no request, or its head byte by byte, is
    closed, and one that does not read its answer's end is dropped: each holds a file descriptor."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _seen: object = None  # at the last look: the request that was answered, or True: closing
        _look: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._seen = self  # neither a request nor True
            self._look = self.loop.call_later(patience, self._looked)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._look is not None:
                self._look.cancel()

        def _looked(self) -> None:
            self._look = self.loop.call_later(patience, self._looked)
            if self.transport.is_closing():
                if self._seen is True:
                    self.transport.abort()
                self._seen = True
                return
            answered = self.cycle is None or self.cycle.response_complete
            if answered and self._seen in (self, self.cycle):
                self.transport.close()
            self._seen = self.cycle if answered else None

    return Protocol
