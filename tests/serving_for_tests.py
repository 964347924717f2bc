"""
The chat server on a free port of the loopback interface, for the tests that talk to it.

    with serving([engine], tokenizer, max_waiting=2) as served:
        served.client.post("/v1/chat/completions", json=...)
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from nanochat.scheduler import Scheduler
from nanochat.serve.api import create_app
from nanochat.serve.guard import Access
from nanochat.serve.limits import Limits
from nanochat.serve.run import make_server

HELLO = [{"role": "user", "content": "Hello"}]
PATIENCE = 120  # seconds; a loaded machine is no failure


@dataclass
class Served:
    """A running server."""

    client: httpx.Client
    server: Any
    thread: threading.Thread

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def address(self) -> tuple[str, int]:
        assert self.client.base_url.port is not None
        return self.client.base_url.host, self.client.base_url.port

    def chat(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"messages": HELLO, **body})

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics; of several with these labels, their sum."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match is None or match[1] != name:
                continue
            has = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= has.items():
                total += float(match[3])
        return total

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self.server.handle_exit(signal.SIGINT, None)

    def connect(self) -> socket.socket:
        """A connection of one's own, for requests that no decent client would send."""
        return socket.create_connection(self.address, timeout=PATIENCE)

    def open_request(self, **body: Any) -> socket.socket:
        """A request sent by hand, so that its connection can be dropped."""
        connection = self.connect()
        raw = json.dumps({"messages": HELLO, **body}).encode()
        head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + raw)
        return connection


@contextmanager
def serving(
    engines: Sequence[Any],
    tokenizer: Any,
    access: Access | None = None,
    make_scheduler: Callable[..., Any] = Scheduler,
    grace: float = 0.5,
    patience: float = 60,
    send_buffer: int | None = None,
    **limits: Any,
) -> Iterator[Served]:
    app = create_app(
        engines, tokenizer, "tiny", Limits(**{"max_context": 128, **limits}), access, make_scheduler
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    if send_buffer is not None:  # bytes that the kernel takes ahead; connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = make_server(app, grace, patience)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            wait_until(lambda: server.started)
            yield Served(client, server, thread)
    finally:
        server.should_exit = True
        thread.join(timeout=PATIENCE)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


def events_of(text: str) -> list[Any]:
    """The payloads of a text/event-stream."""
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks]


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
