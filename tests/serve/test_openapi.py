"""
What the server's own OpenAPI document allows, and what it forbids: never a 5xx, and every answer is
as the document says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from nanochat.engine import Engine
from nanochat.serve.guard import Access
from tests.engines_for_tests import (
    BrokenScheduler,
    ScriptedEngine,
    ScriptedScheduler,
    script_of,
)
from tests.models_for_tests import tiny_model
from tests.serving_for_tests import HELLO, Served, events_of, serving, wait_until
from tests.tokenizers_for_tests import tiny_tokenizer

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.specs.openapi import checks as conformance  # noqa: E402

TOKENIZER = tiny_tokenizer()
KEY = "secret"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]


@schemathesis.deserializer("text/event-stream")
def payloads(_: Any, response: Any) -> list[Any]:
    """What the events of a stream carry; each is held against the schema."""
    return events_of(response.content.decode())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model = tiny_model("gpt", vocab_size=TOKENIZER.get_vocab_size(), sequence_len=32)
    with serving([Engine(model, TOKENIZER)], TOKENIZER, max_context=32, max_new_tokens=4) as server:
        yield server


PATHS = [
    "/health", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
    "/v1/completions",
]  # fmt: skip


def test_the_document_has_every_route_and_parameter(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    assert set(document["paths"]) == set(PATHS)
    schemas = document["components"]["schemas"]
    assert {"messages", "top_p", "truncation"} <= set(schemas["ChatRequest"]["properties"])
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert "context_length_exceeded" in document["info"]["description"]


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", PATHS)
def test_no_input_makes_it_fail_and_answers_are_as_described(
    served: Served, path: str, mode: str
) -> None:
    """`positive`: what the document allows; `negative`: what it does not."""
    if mode == "negative" and "completions" not in path:
        pytest.skip("nothing is wrong with a request that has no parameters")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    (operation,) = [r.ok() for r in schema.get_all_operations() if r.ok().path == path]
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    statuses: list[int] = []

    @given(case=cases)
    @settings(
        max_examples=60 if operation.method == "post" else 10,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def ask(case: Any) -> None:
        if mode == "positive" and len(statuses) % 2 and isinstance(case.body, dict):
            # What no schema says: which model there is, and that the user speaks last
            case.body.pop("model", None)
            if "messages" in case.body:
                case.body["messages"] = [{"role": "user", "content": "Hello"}]
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode == "positive" and "{" not in path:
        assert 200 in statuses  # so it went deep enough


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": "The", "logprobs": 2, "n": 2},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", REQUESTS)
def test_tool_calls_log_probabilities_and_usage_are_as_described(
    served: Served, path: str, stream: bool
) -> None:
    """What generated requests seldom come to, and a tiny model never: a tool call."""
    body = {**REQUESTS[path], "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    said = call(served, path, body)
    assert '"bytes"' in said or '"text_offset"' in said
    if "chat" in path:
        body.update(tool_format="parts", truncation="auto")
    reply = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "27+15"},
        {"type": "python_output", "text": "42"},
    ]
    engine = ScriptedEngine(script_of(TOKENIZER, reply))
    with serving([engine], TOKENIZER, make_scheduler=ScriptedScheduler) as with_tools:
        assert "27+15" in call(with_tools, path, body)


def call(served: Served, path: str, body: dict[str, Any]) -> str:
    """Asks, holds the answer against the document, and returns its text."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    return str(case.call_and_validate(checks=CHECKS).text)


def test_an_answer_that_is_not_as_described_is_noticed(served: Served) -> None:
    """The checks can fail: a document that promises another field is caught in a lie."""
    document = served.client.get("/openapi.json").json()
    for shape in ("TextCompletion", "TextChunk"):
        document["components"]["schemas"][shape]["required"].append("promised")
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.url)
    for stream in (False, True):
        body = {"prompt": "The", "stream": stream}
        case = schema["/v1/completions"]["POST"].Case(body=body, media_type="application/json")
        with pytest.raises(
            schemathesis.core.failures.FailureGroup, match=r"promised|SSE event violates schema"
        ):
            case.call_and_validate(checks=CHECKS)


def documented(served: Served) -> dict[str, set[int]]:
    """path -> the statuses that its route may answer with."""
    paths = served.client.get("/openapi.json").json()["paths"]
    return {
        path: {int(status) for operation in methods.values() for status in operation["responses"]}
        for path, methods in paths.items()
    }


def test_every_documented_status_occurs() -> None:
    seen: dict[str, set[int]] = {path: set() for path in PATHS}

    def ask(served: Served, path: str, status: int, **kwargs: Any) -> None:
        method = "POST" if path in REQUESTS else "GET"
        if method == "POST" and "content" not in kwargs:
            kwargs.setdefault("json", REQUESTS[path])
        kwargs["headers"] = {"Authorization": f"Bearer {KEY}", **kwargs.get("headers", {})}
        name = path.replace("{name}", kwargs.pop("name", "tiny"))
        response = served.client.request(method, name, **kwargs)
        assert response.status_code == status, (path, response.text)
        seen[path].add(status)

    script = script_of(TOKENIZER, [{"type": "text", "text": "Yes"}])
    access = Access(api_key=KEY, hosts=["127.0.0.1"])
    start = partial(serving, tokenizer=TOKENIZER, access=access)
    scripted = partial(start, make_scheduler=ScriptedScheduler)
    with scripted([ScriptedEngine(script)], max_body=1000) as served:
        wanted = documented(served)
        for path in PATHS:
            ask(served, path, 200)
            ask(served, path, 403, headers={"Host": "elsewhere"})
            ask(served, path, 413, content=b" " * 1001)
            if path != "/health":
                ask(served, path, 401, headers={"Authorization": "Bearer wrong"})
        ask(served, "/v1/models/{name}", 404, name="none")
        for path, body in REQUESTS.items():
            ask(served, path, 400, json={**body, "n": 0})
            ask(served, path, 404, json={**body, "model": "none"})
    with start([ScriptedEngine(script)], make_scheduler=BrokenScheduler) as served:
        for path in REQUESTS:
            ask(served, path, 500)
    engine = ScriptedEngine(script)
    engine.gate = threading.Event()  # no reply ends before it opens
    with scripted([engine], request_timeout=0.2) as served:
        for path in REQUESTS:
            ask(served, path, 408)
        engine.gate.set()
    engine = ScriptedEngine(script)
    engine.gate = threading.Event()
    with (
        scripted([engine], max_concurrent=1, max_waiting=0, grace=60) as served,
        ThreadPoolExecutor(1) as threads,
    ):
        path = "/v1/chat/completions"
        threads.submit(ask, served, path, 200)
        wait_until(lambda: served.health()["running"] == 1)
        for path, body in REQUESTS.items():
            ask(served, path, 429, json={**body, "n": 1})
        served.interrupt()
        for path in (*REQUESTS, "/health"):
            ask(served, path, 503)
        engine.gate.set()
    assert seen == wanted
