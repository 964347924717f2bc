"""
What stands before every route: who may ask, how much, and for how long.

A plain ASGI middleware. In this order: is the server going down; does the request name this host
(a web page elsewhere can make a browser ask 127.0.0.1 under its own name: DNS rebinding) and come
from a page of ours or an allowed one; does it carry the key; is its body small and here in time.
Then it is answered, within the time limit. Every answer is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.serve.limits import Limits
from nanochat.serve.metrics import Metrics
from nanochat.serve.protocol import ApiError, show
from nanochat.serve.worker import busy, shutting_down

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Answered without a key: the page has to be there to ask for one, and a balancer asks for health.
OPEN_ROUTES = ("/", "/health", "/openapi.json")
ROUTES = (*OPEN_ROUTES, "/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics")

MAX_ARRIVING = 256  # bodies that may be on their way at once, each up to the limit in memory

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    hosts: Sequence[str] | None = None
    """Names by which the server may be called (Host header, without port); None: any."""
    origins: Sequence[str] = ()
    """Web pages elsewhere that may ask, as "https://example.org"."""


class Guard:
    """The middleware. What a route leaves in `request.state.at_end` is called when its answer has
    been sent, or cannot be."""

    def __init__(self, app: App, access: Access, limits: Limits, metrics: Metrics) -> None:
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self._arriving = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["at_end"] = []
        exchange = _Exchange(scope, send)
        try:
            self._admit(scope)
            if scope["method"] == "POST":
                receive = await self._read(scope, receive)
            await asyncio.wait_for(
                self.app(scope, receive, exchange.send), self.limits.request_timeout
            )
        except ApiError as e:
            await exchange.refuse(e)
        except (asyncio.TimeoutError, TimeoutError):
            seconds = f"{self.limits.request_timeout:g}"
            message = f"not answered within the {seconds} seconds that this server allows"
            # Clients repeat a request by themselves after 408: that would only add to the load
            headers = {"x-should-retry": "false"}
            await exchange.refuse(ApiError(message, None, "timeout", 408, headers))
        except Exception:
            exchange.outcome = 500
            raise
        finally:
            for end in scope["state"]["at_end"]:
                end()
            route = scope["path"] if scope["path"] in ROUTES else "other"
            gone = scope["state"].get("client_gone") or exchange.status == 0
            status = exchange.outcome or (499 if gone else exchange.status)
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - exchange.began)

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        """Raises ApiError where a request may not come in, by its head alone."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        hosts = self.access.hosts
        if hosts is not None and _name(host) not in hosts:
            message = f"this server does not answer as {show(host)}; see --allowed_hosts"
            raise ApiError(message, None, "host_not_allowed", 403)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        own = re.sub(r"^https?://", "", origin) == host
        if origin and not own and origin not in self.access.origins:
            message = f"this server does not answer pages from {show(origin)}; see --cors_origins"
            raise ApiError(message, None, "origin_not_allowed", 403)
        if self.access.api_key is not None and scope["path"] not in OPEN_ROUTES:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not _same(given.strip(), self.access.api_key):
                message = "this server wants its API key, as Authorization: Bearer KEY"
                raise ApiError(
                    message, None, "invalid_api_key", 401, {"WWW-Authenticate": "Bearer"}
                )
        if scope["method"] == "POST" and scope["app"].state.draining:
            raise shutting_down(self.limits.read_timeout)
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size[:20]) > self.limits.max_body:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        message = f"the request is longer than {self.limits.max_body} bytes"
        return ApiError(message, code="request_too_large", status=413)

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        """The whole body, never more than the limit in memory, whatever its headers claim; returns
        a `receive` that has it ready."""
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    scope["state"]["client_gone"] = True
                    raise ApiError("client closed the request", status=499)
                body.extend(message.get("body", b""))
                more = message.get("more_body", False)
                if len(body) > self.limits.max_body:
                    raise self._too_long()

        if self._arriving >= MAX_ARRIVING:
            raise busy(f"{self._arriving} requests are arriving")
        self._arriving += 1
        try:
            await asyncio.wait_for(read(), self.limits.read_timeout)
        except (asyncio.TimeoutError, TimeoutError) as e:
            message = f"the request did not arrive within {self.limits.read_timeout:g} seconds"
            headers = {"Connection": "close", "x-should-retry": "false"}
            raise ApiError(message, None, "timeout", 408, headers) from e
        finally:
            self._arriving -= 1
        ready: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return ready.pop() if ready else await receive()

        return replay


class _Exchange:
    """What has been sent of one answer."""

    def __init__(self, scope: MutableMapping[str, Any], send: Send) -> None:
        self.began = scope["state"]["began"] = time.monotonic()
        self.status = 0  # as sent; 0: nothing yet
        self.outcome = 0  # the status of an error, which a stream may come to after its 200
        self._send = send
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streams = any(b"event-stream" in value for _, value in message["headers"])
        await self._send(message)

    async def refuse(self, e: ApiError) -> None:
        """Answers with an error; where an answer has begun, the error goes where its text went."""
        self.outcome = e.status
        if self.status == 0:
            headers = {"Content-Type": "application/json", **e.headers}
            pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
            await self.send({"type": "http.response.start", "status": e.status, "headers": pairs})
            await self._send({"type": "http.response.body", "body": json.dumps(e.body).encode()})
        elif self._streams:
            last = f"data: {json.dumps(e.body)}\n\ndata: [DONE]\n\n".encode()
            # A client that does not read keeps us waiting here too, but not for long
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(
                    self._send({"type": "http.response.body", "body": last}), timeout=1
                )


def _name(host: str) -> str:
    """A Host header without its port, IPv6 without brackets."""
    match = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d+)?|([^:\[\]]*)(:\d+)?", host)
    return (match[1] or match[3]) if match else ""


def _same(given: bytes, key: str) -> bool:
    """Compared in a time that tells nothing of either, their lengths included."""
    digests = (hashlib.sha256(text).digest() for text in (given, key.encode()))
    return hmac.compare_digest(*digests)
