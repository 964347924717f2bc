"""The official openai client against a real server with a real (tiny, random) model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanochat.engine import Engine
from tests.models_for_tests import tiny_model
from tests.serving_for_tests import HELLO, Served, serving
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = 96


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model = tiny_model("gpt", vocab_size=TOKENIZER.get_vocab_size(), sequence_len=CONTEXT)
    with serving(
        [Engine(model, TOKENIZER)], TOKENIZER, max_context=CONTEXT, max_new_tokens=16
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=120) as made:
        yield made


def chat(client: openai.OpenAI, **more: Any) -> Any:
    asked = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 12, **more}
    return client.chat.completions.create(**asked)


def complete(client: openai.OpenAI, **more: Any) -> Any:
    asked = {"model": "tiny", "prompt": "Once upon", "seed": 5, "max_tokens": 12, **more}
    return client.completions.create(**asked)


def text_of(stream: Any) -> tuple[str, str, list[Any]]:
    """(text, finish_reason, chunks) of a chat stream with one choice."""
    chunks = list(stream)
    choices = [c.choices[0] for c in chunks if c.choices]
    text = "".join(c.delta.content or "" for c in choices)
    return text, next(c.finish_reason for c in choices if c.finish_reason), chunks


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_reply_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert 1 <= whole.usage.completion_tokens <= 12
    text, reason, chunks = text_of(
        chat(client, stream=True, stream_options={"include_usage": True})
    )
    assert text == whole.choices[0].message.content and reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[0].choices[0].delta.role == "assistant"


def test_the_seed_decides(client: openai.OpenAI) -> None:
    def said(**more: Any) -> str:
        return chat(client, temperature=1.5, **more).choices[0].message.content

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(5)}) > 1
    assert len({said(seed=None) for _ in range(5)}) > 1


def test_temperature_and_top_p(client: openai.OpenAI) -> None:
    greedy = {chat(client, temperature=0, seed=s).choices[0].message.content for s in range(3)}
    narrow = {chat(client, top_p=1e-9, seed=s).choices[0].message.content for s in range(3)}
    assert len(greedy) == 1 and narrow == greedy
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert chat(client, extra_body=extra).choices[0].message.content in greedy


def test_lengths(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{"max_tokens": openai.omit, name: 3, "temperature": 0})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
    default = chat(client, max_tokens=openai.omit)
    assert default.usage.completion_tokens <= 16
    long = chat(client, max_tokens=CONTEXT)  # ends where the context does
    assert long.usage.total_tokens <= CONTEXT


def test_several_replies(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, temperature=1.5)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == chat(client, temperature=1.5).choices[0].message.content
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1.5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, stream: bool) -> None:
    full = chat(client, temperature=1.0, max_tokens=40).choices[0].message.content
    stop = full[5:8]  # across tokens, somewhere within
    before = full[: full.index(stop)]
    for given in (stop, [stop, "never said"]):
        answer = chat(client, temperature=1.0, max_tokens=40, stop=given, stream=stream)
        if stream:
            text, reason, _ = text_of(answer)
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (before, "stop")


def test_logprobs_of_a_conversation(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    said = answer.choices[0].message.content
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace") == said
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        values = [t.logprob for t in token.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1.0001
        if bytes(token.bytes) in [bytes(t.bytes) for t in token.top_logprobs]:
            same = [t.logprob for t in token.top_logprobs if t.bytes == token.bytes]
            assert min(abs(token.logprob - value) for value in same) < 1e-4
    chunks = list(chat(client, logprobs=True, top_logprobs=4, stream=True))
    streamed = [
        token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_log_probabilities_are_of_the_text_that_is_shown(client: openai.OpenAI) -> None:
    full = chat(client, max_tokens=40).choices[0].message.content
    stop = full[6:8]
    for stream in (False, True):
        answer = chat(client, max_tokens=40, stop=stop, logprobs=True, stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
        scored = b"".join(bytes(t.bytes) for t in tokens).decode("utf-8", "replace")
        shown = full[: full.index(stop)]
        # The last token may be partly text and partly the stop string
        assert scored.startswith(shown) and len(scored) < len(shown) + 12


def test_a_plain_text_is_continued(client: openai.OpenAI) -> None:
    whole = complete(client)
    assert whole.choices[0].finish_reason in ("stop", "length")
    streamed = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == whole.choices[0].text
    assert streamed[-1].usage == whole.usage
    several = complete(client, prompt=["Once upon", "A man"], n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == whole.choices[0].text  # whoever it is asked with
    ids = TOKENIZER.encode("Once upon", prepend="<|bos|>")
    assert complete(client, prompt=ids).choices[0].text == whole.choices[0].text
    assert complete(client, user="someone", echo=False, best_of=1).choices[0].text


def test_logprobs_of_a_plain_text(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    n = len(choice.logprobs.tokens)
    assert n and len(choice.logprobs.token_logprobs) == n and len(choice.logprobs.text_offset) == n
    assert all(len(top) <= 3 and top for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0 and all(
        v <= 0 for v in choice.logprobs.token_logprobs
    )


UNSUPPORTED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"50": 1},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "functions": [{"name": "f"}],
    "audio": {"format": "mp3", "voice": "alloy"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_a_400_that_names_it(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=name) as e:
        chat(client, **{name: UNSUPPORTED[name]})
    assert e.value.param == name and e.value.code == "unsupported_parameter"


@pytest.mark.parametrize("name", ["best_of", "echo", "suffix", "logit_bias"])
def test_what_is_not_supported_for_plain_text_is_named_too(
    client: openai.OpenAI, name: str
) -> None:
    value = {"best_of": 2, "echo": True, "suffix": "x", "logit_bias": {"5": 1}}[name]
    with pytest.raises(openai.BadRequestError, match=name):
        complete(client, **{name: value})


def test_every_parameter_of_the_client_is_taken_or_named(client: openai.OpenAI) -> None:
    """Those that the installed client knows, whatever its version: none is silently ignored."""
    from openai.types.chat import completion_create_params as params
    from openai.types.completion_create_params import CompletionCreateParamsBase

    from nanochat.serve.protocol import ChatRequest, CompletionRequest

    for theirs, ours, ask in [
        (params.CompletionCreateParamsBase, ChatRequest, chat),
        (CompletionCreateParamsBase, CompletionRequest, complete),
    ]:
        unknown = sorted(set(theirs.__annotations__) - set(ours.model_fields))
        assert len(unknown) > 3
        for name in unknown:
            with pytest.raises(openai.BadRequestError, match=name):
                ask(client, extra_body={name: "some value"})


def test_wrong_values_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, temperature=9)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, messages=[{"role": "user", "content": "word " * 500}])
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-4")
    image = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    with pytest.raises(openai.BadRequestError):
        chat(client, messages=[{"role": "user", "content": image}])


def test_a_conversation_goes_on_with_the_clients_own_objects(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *HELLO]
    for _ in range(2):
        message = chat(client, messages=messages, temperature=0, max_tokens=5).choices[0].message
        assert message.content
        messages += [message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
