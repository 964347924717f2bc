"""Who may ask the server, how much, and for how long."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from nanochat.serve.guard import LOOPBACK_NAMES, Access
from tests.engines_for_tests import ScriptedEngine, ScriptedScheduler, script_of
from tests.serving_for_tests import HELLO, PATIENCE, Served, serving, wait_until
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KEY = "sk-of-this-test"
PAGE = "https://pages.example.org"


def engine(**more: Any) -> ScriptedEngine:
    return ScriptedEngine(script_of(TOKENIZER, "Hello!"), **more)


guarded = partial(serving, tokenizer=TOKENIZER, make_scheduler=ScriptedScheduler)


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[Served]:
    access = Access(hosts=LOOPBACK_NAMES)
    with guarded([engine()], access=access, read_timeout=2, patience=2, max_body=100_000) as served:
        yield served


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with guarded([engine()], access=Access(api_key=KEY, origins=[PAGE])) as served:
        yield served


def status(served: Served, **headers: str) -> int:
    body = {"messages": HELLO}
    return served.client.post("/v1/chat/completions", json=body, headers=headers).status_code


# ---- names


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:8000", "[::1]:80", "[::1]"])
def test_it_answers_to_its_names(open_to_all: Served, host: str) -> None:
    assert status(open_to_all, Host=host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[::2]", "a:b", ""]
)
def test_another_name_for_this_machine_is_refused(open_to_all: Served, host: str) -> None:
    """DNS rebinding: evil.example resolves to 127.0.0.1, and a page of it asks."""
    response = open_to_all.client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert open_to_all.client.get("/", headers={"Host": host}).status_code == 403


def test_pages_from_elsewhere_are_refused(open_to_all: Served) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert status(open_to_all, Origin=origin) == 403
    assert status(open_to_all, Origin=open_to_all.url) == 200
    response = open_to_all.client.get("/health", headers={"Origin": open_to_all.url})
    assert "access-control-allow-origin" not in response.headers


def test_a_page_can_not_ask_without_asking_first(open_to_all: Served) -> None:
    """Browsers send text/plain across origins without a preflight: it is not taken for JSON."""
    raw = json.dumps({"messages": HELLO})
    headers = {"Content-Type": "text/plain"}
    response = open_to_all.client.post("/v1/chat/completions", content=raw, headers=headers)
    assert response.status_code == 400


def test_named_pages_may_ask(locked: Served) -> None:
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = locked.client.options("/v1/chat/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    for key, wanted in [(KEY, 200), ("wrong", 401)]:
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        response = locked.client.get("/v1/models", headers=headers)
        assert response.status_code == wanted
        assert response.headers["access-control-allow-origin"] == PAGE  # the page may read it
    evil = {**preflight, "Origin": "https://evil.example"}
    response = locked.client.options("/v1/chat/completions", headers=evil)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


# ---- the key


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing", "/nothing"])
def test_everything_wants_the_key(locked: Served, path: str) -> None:
    get = locked.client.get
    assert get(path).status_code == 401
    for wrong in ("", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
        response = get(path, headers={"Authorization": wrong})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert KEY not in response.text
    assert get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code in (200, 404)
    assert get(path, headers={"Authorization": f"bearer {KEY}"}).status_code in (200, 404)


def test_the_page_and_health_are_there_without_the_key(locked: Served) -> None:
    assert locked.client.get("/").status_code == 200
    assert locked.client.get("/openapi.json").status_code == 200
    assert locked.health()["needs_key"] is True
    assert KEY not in locked.client.get("/").text + locked.client.get("/health").text


def test_the_key_is_in_no_log(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        status(locked, Authorization=f"Bearer {KEY}")
        status(locked, Authorization=f"Bearer {KEY}x")
    assert KEY not in caplog.text


# ---- size and time


def test_too_large_a_body_is_refused_whatever_its_headers_say(open_to_all: Served) -> None:
    post = partial(
        open_to_all.client.post,
        "/v1/chat/completions",
        headers={"Content-Type": "application/json"},
    )
    assert post(content=b" " * 10_000_000).status_code == 413
    pieces = (b" " * 50_000 for _ in range(20))  # sent without a length
    response = post(content=pieces)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert status(open_to_all) == 200


def closed_by_server(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def test_a_body_that_comes_too_slowly_is_refused(open_to_all: Served) -> None:
    with open_to_all.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        assert b"408" in closed_by_server(connection).split(b"\r\n")[0]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_never_comes_is_not_waited_for(open_to_all: Served, sent: bytes) -> None:
    with open_to_all.connect() as connection:
        connection.sendall(sent)
        assert closed_by_server(connection) == b""
    with open_to_all.connect() as connection:  # after a request that was fine
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + sent)
        assert closed_by_server(connection).startswith(b"HTTP/1.1 200")


def test_only_so_many_bodies_are_on_their_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.serve.guard.MAX_ARRIVING", 2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    with guarded([engine()], read_timeout=PATIENCE) as served:
        connections = [served.connect() for _ in range(2)]
        for connection in connections:
            connection.sendall(head)
        wait_until(lambda: status(served) == 429)
        for connection in connections:
            connection.close()
        wait_until(lambda: status(served) == 200)


def test_slow_loris(open_to_all: Served) -> None:
    """Many connections that drip a head, a byte at a time: others are served, these are closed."""
    connections = [open_to_all.connect() for _ in range(100)]
    for i in range(40):
        for connection in connections:
            try:
                connection.sendall(
                    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Filler: aaaa"[i : i + 1]
                )
            except OSError:
                continue
        assert open_to_all.health()["status"] == "ok"
        time.sleep(0.05)
    for connection in connections:
        closed_by_server(connection)
        connection.close()
    wait_until(lambda: len(open_to_all.server.server_state.connections) <= 2)


def test_who_does_not_read_is_not_waited_for() -> None:
    talkative = ScriptedEngine(script_of(TOKENIZER, "harbour " * 8), endless=True)
    limits = {"max_context": 10**9, "request_timeout": 2, "max_concurrent": 64}
    with guarded([talkative], patience=1, send_buffer=4096, **limits) as served:
        connection = served.open_request(stream=True, max_tokens=10**6, n=64)
        ours = connection.getsockname()

        def mine() -> Any:
            open_ones = list(served.server.server_state.connections)
            return next((one for one in open_ones if one.client == ours), None)

        wait_until(lambda: mine() is not None)
        wait_until(lambda: mine() is None or mine().flow.write_paused)
        wait_until(lambda: served.health()["running"] == 0)  # the rows are free again
        wait_until(lambda: mine() is None)  # and the connection
        connection.close()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00" * 1000,
        b"\x16\x03\x01\x02\x00",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%ff%fe/%00?%zz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        GET + b"Upgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    ],
)
def test_what_is_no_decent_http_gets_4xx_or_nothing(open_to_all: Served, raw: bytes) -> None:
    with open_to_all.connect() as connection:
        connection.sendall(raw)
        answer = closed_by_server(connection)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    assert open_to_all.health()["status"] == "ok"
