"""Whatever the server's own OpenAPI document allows, and what it forbids: never a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nanochat.engine import Engine
from tests.models_for_tests import tiny_model
from tests.serving_for_tests import Served, serving
from tests.tokenizers_for_tests import tiny_tokenizer

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model = tiny_model("gpt", vocab_size=TOKENIZER.get_vocab_size(), sequence_len=32)
    with serving([Engine(model, TOKENIZER)], TOKENIZER, context=32, max_tokens=4) as server:
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
def test_no_input_makes_it_fail(served: Served, path: str, mode: str) -> None:
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
        case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    if mode == "positive" and "{" not in path:
        assert 200 in statuses  # so it went deep enough
