"""What a request may say. Wrong ones are refused by name; none may raise anything else."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from pydantic import ValidationError

from nanochat.sampling import Sampling
from nanochat.serve.limits import Limits
from nanochat.serve.protocol import ApiError, ChatRequest, CompletionRequest, refusal

LIMITS = Limits(max_context=128, max_new_tokens=64, temperature=0.8, top_k=50, max_concurrent=2)
HELLO = [{"role": "user", "content": "Hello"}]


def parse(body: Any) -> ChatRequest:
    """A request through everything that checks it, as the server does."""
    try:
        chat = ChatRequest.model_validate(body)
    except ValidationError as e:
        raise refusal(e.errors()) from e
    chat.check("tiny", LIMITS)
    chat.conversation()
    return chat


def sampling(**body: Any) -> Sampling:
    return parse({"messages": HELLO, **body}).sampling(LIMITS, room=100)


def test_defaults_are_the_servers() -> None:
    chat = parse({"messages": HELLO})
    assert chat.conversation() == {"messages": HELLO}
    assert not chat.stream and not chat.stream_options.include_usage and chat.n == 1
    taken = sampling(seed=1)
    assert taken == Sampling(max_tokens=64, temperature=0.8, top_k=50, seed=1)
    assert len({sampling().seed for _ in range(5)}) == 5  # asking again gives another answer


def test_parameters_are_taken() -> None:
    taken = sampling(
        temperature=0, top_k=0, max_completion_tokens=5, seed=-1, top_p=0.5, min_p=0.1, n=2,
        repetition_penalty=1.5, stop=["a", "b"], logprobs=True, top_logprobs=3, model="tiny",
    )  # fmt: skip
    assert taken == Sampling(
        max_tokens=5, temperature=0.0, top_k=None, top_p=0.5, min_p=0.1, repetition_penalty=1.5,
        seed=2**63 - 1, stop=("a", "b"), logprobs=3,
    )  # fmt: skip
    assert sampling(stop="end").stop == ("end",)
    assert sampling(logprobs=True).logprobs == 0
    assert sampling(max_tokens=128).max_tokens == 100  # the room there is
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chat = parse({"messages": HELLO, **options})
    assert chat.stream and chat.stream_options.include_usage


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_taken_can_be_sampled_with(seed: int) -> None:
    """What this file lets through, Sampling.check() accepts."""
    rng = random.Random(seed)
    choices: dict[str, list[Any]] = {
        "temperature": [0, 2, 1e-9, 0.7],
        "top_p": [1, 1e-9, 0.5],
        "min_p": [0, 1, 0.3],
        "top_k": [0, 1, 2**31 - 1],
        "repetition_penalty": [1, 10, 1e-6],
        "max_tokens": [1, 128],
        "seed": [-(2**63), 2**63 - 1, 0],
        "stop": [[], ["x"] * 16, "y" * 256],
        "n": [1, 2],
    }
    some = rng.sample(sorted(choices), 4)
    sampling(**{key: rng.choice(choices[key]) for key in some}).check()


def test_what_clients_send_as_defaults_is_let_through() -> None:
    neutral: dict[str, Any] = {
        "n": 1, "top_p": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "stop": None,
        "user": "u", "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
        "logit_bias": {}, "logprobs": False, "top_logprobs": None, "store": False,
        "metadata": {"a": "b"}, "modalities": ["text"], "service_tier": "auto",
    }  # fmt: skip
    assert parse({"messages": HELLO, **neutral}).length_asked is None


def test_unsupported_parameters_are_named_together() -> None:
    with pytest.raises(ApiError) as e:
        parse({"messages": HELLO, "frequency_penalty": 0.9, "best_of": 3})
    assert "frequency_penalty, best_of" in str(e.value)
    error = e.value.body["error"]
    assert (error["param"], error["code"]) == ("frequency_penalty", "unsupported_parameter")


def test_parts_of_text_are_joined_and_tool_parts_kept() -> None:
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": parts},
        *HELLO,
        {"role": "assistant", "content": "shown as text", "parts": parts, "refusal": None},
        *HELLO,
    ]
    kept = parse({"messages": messages}).conversation()["messages"]
    assert [m["content"] for m in kept] == ["Be brief.", "ab", parts, "Hello", parts, "Hello"]
    assert kept[0]["role"] == "system"


def test_a_text_to_continue_comes_in_four_forms() -> None:
    def prompts(value: Any) -> Any:
        return CompletionRequest.model_validate({"prompt": value}).prompts()

    assert prompts("a") == ["a"] and prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]] and prompts([[1], [2]]) == [[1], [2]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ("text", None),
        (7, None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": []}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{**HELLO[0], "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [{**HELLO[0], "parts": []}]}, "messages[0].parts"),
        ({"messages": [*HELLO, *HELLO]}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": HELLO, "temperature": 3}, "temperature"),
        ({"messages": HELLO, "temperature": True}, "temperature"),
        ({"messages": HELLO, "temperature": "1"}, "temperature"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
        ({"messages": HELLO, "temperature": 10**400}, "temperature"),
        ({"messages": HELLO, "top_p": 0}, "top_p"),
        ({"messages": HELLO, "top_k": -1}, "top_k"),
        ({"messages": HELLO, "top_k": 1.5}, "top_k"),
        ({"messages": HELLO, "min_p": 2}, "min_p"),
        ({"messages": HELLO, "repetition_penalty": 0}, "repetition_penalty"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 129}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 129}, "max_completion_tokens"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": HELLO, "seed": 2**63}, "seed"),
        ({"messages": HELLO, "stop": ""}, "stop"),
        ({"messages": HELLO, "stop": ["a", 1]}, "stop[1]"),
        ({"messages": HELLO, "stop": ["a"] * 17}, "stop"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": HELLO, "stream_options": 1}, "stream_options"),
        ({"messages": HELLO, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "n": 67}, "n"),
        ({"messages": HELLO, "n": True}, "n"),
        ({"messages": HELLO, "logprobs": 1}, "logprobs"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": HELLO, "presence_penalty": -1}, "presence_penalty"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "truncation": "yes"}, "truncation"),
        ({"messages": HELLO, "model": "gpt-4"}, "model"),
        ({"messages": HELLO, "model": ["\udfff"]}, "model"),
        ({"messages": HELLO, "model": "\udfff"}, "model"),
        ({"messages": HELLO, "\ud800": 1}, "\\ud800"),
    ],
)
def test_wrong_requests_are_refused_by_name(body: Any, param: str | None) -> None:
    with pytest.raises(ApiError) as e:
        parse(body)
    error = e.value.body["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert 400 <= e.value.status < 500
    assert len(error["message"]) < 400
    # An answer is UTF-8: nothing that came in may make it impossible to send.
    json.dumps(e.value.body, ensure_ascii=False).encode()


def test_a_value_that_is_deeply_nested_is_refused_all_the_same() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ApiError) as e:
        parse({"messages": HELLO, "seed": deep})
    assert e.value.body["error"]["param"] == "seed"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 10_000},
        {"messages": [{"role": "user", "content": [1] * 10_000}]},
        {"messages": [{str(i): 1 for i in range(10_000)}]},
        {str(i): 1 for i in range(10_000)},
        {"messages": HELLO, "metadata": {str(i): 1 for i in range(10_000)}},
        {"messages": HELLO, "stop": [1] * 10_000},
        {"prompt": [{}] * 10_000},
        {"prompt": [[1], "x"] * 10_000},
    ],
)
def test_a_request_wrong_in_many_places_is_looked_at_in_few(body: dict[str, Any]) -> None:
    """All errors of a hostile megabyte would take half a minute, in which nobody is served."""
    with pytest.raises(ValidationError) as e:
        (CompletionRequest if "prompt" in body else ChatRequest).model_validate(body)
    assert e.value.error_count() < 10
    assert refusal(e.value.errors()).status == 400


def test_mangled_requests_are_refused_and_nothing_worse() -> None:
    """Random values in random places of a good request: parsed, or ApiError."""
    rng = random.Random(0)
    values: list[Any] = [None, True, -1, 0, 1e308, float("inf")]
    values += ["", "\udc00", [], {}, [[]], [{}], {"role": 1}]
    keys = [*ChatRequest.model_fields, "x"]
    refused = 0
    for _ in range(2000):
        body: dict[str, Any] = {"messages": [dict(HELLO[0])]}
        for _ in range(rng.randint(1, 3)):
            where = rng.choice([body, body["messages"][0]] if _is_whole(body) else [body])
            where[rng.choice([*keys, "role", "content"])] = copy.deepcopy(rng.choice(values))
        try:
            parse(body)
        except ApiError:
            refused += 1
    assert refused > 1000


def _is_whole(body: dict[str, Any]) -> bool:
    messages = body["messages"]
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict)
