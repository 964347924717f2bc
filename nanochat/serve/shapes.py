"""
The shapes of what the server answers, as /openapi.json describes them.

answers.py writes the answers; the test of the OpenAPI document holds them against these models,
which are closed: a field that is not listed here is not sent. Errors have their shape here too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"

FinishReason = Literal["stop", "length"]
"""stop: the model ended its reply, or a stop string did; length: no room was left."""


class Shape(BaseModel):
    """Closed, and described by the texts under its fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorObject(Shape):
    """What was wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(Shape):
    """The body of every answer that is not 200, and the event that a stream fails with."""

    error: ErrorObject


class ModelCard(Shape):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    """When the server started, in seconds since 1970."""
    owned_by: str


class ModelList(Shape):
    """The one model there is."""

    object: Literal["list"]
    data: list[ModelCard]


class Defaults(Shape):
    """What is taken where a request says nothing."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_tokens: int


class Health(Shape):
    """What is served, with which limits, and how busy it is."""

    status: Literal["ok", "shutting_down"]
    model: str
    context: int
    """Tokens of conversation and reply together."""
    max_reply_tokens: int
    defaults: Defaults
    needs_key: bool
    workers: int
    running: int
    waiting: int


class Usage(Shape):
    """Tokens of a request and of all its replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Scored(Shape):
    """A token and its log-probability. A token may end within a character: `bytes` are its own."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(Scored):
    """A token of the reply, with the likeliest ones in its place."""

    top_logprobs: list[Scored]


class ChatLogprobs(Shape):
    """The reply's tokens, in order."""

    content: list[ScoredToken]
    refusal: None


class TextLogprobs(Shape):
    """The same in the older form, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Bytes of the reply before each token."""


class ReplyPart(Shape):
    """A piece of a reply: text, a tool call, or what the tool said."""

    type: Literal["text", "python", "python_output"]
    text: str


class ChatMessage(Shape):
    """The reply."""

    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[ReplyPart] = []
    """Extension, where the model called a tool: its text and tool parts in order."""


class ChatChoice(Shape):
    """One of `n` replies."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Head(Shape):
    """What every answer begins with."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


class ChatHead(Head):
    """What an answer to a conversation begins with."""

    dropped_messages: int = 0
    """Extension, with "truncation": "auto" only: messages left out for want of context."""


class ChatCompletion(ChatHead):
    """A whole answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Shape):
    """What is new."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool: ReplyPart | None = None
    """Extension, with "tool_format": "parts": a tool call or its output, whole."""


class ChatChunkChoice(Shape):
    """A piece of one of `n` replies; the last one has the reason of its end."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(ChatHead):
    """An event of a streamed answer to a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    """With `include_usage` only: null, but in the last chunk, which has no choices."""


class TextChoice(Shape):
    """One of the continuations."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(Head):
    """A whole answer to a text."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(Shape):
    """A piece of one of the continuations; the last one has the reason of its end."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextChunk(Head):
    """An event of a streamed answer to a text."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    """With `include_usage` only: null, but in the last chunk, which has no choices."""


# Statuses that a route may refuse with, and when. Every body is an ErrorAnswer.
REFUSALS = {
    400: "The request is wrong: `param` names where",
    401: "The API key is missing or wrong",
    403: "Asked under another host's name, or by a page that is not allowed",
    404: "There is no such model",
    408: "The request arrived, or was answered, too slowly",
    413: "The body is larger than this server takes",
    429: "All places are taken: try again after the seconds of Retry-After",
    500: "A fault of the server's",
    503: "Shutting down: try again after the seconds of Retry-After",
}
ANY = (403, 413)  # by the guard, whatever is asked
KEYED = (401, *ANY)
POSTED = (400, 401, 403, 404, 408, 413, 429, 500, 503)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that refuses with these statuses."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": ErrorAnswer, "description": REFUSALS[status]}
        if status in (429, 503):
            seconds = {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}
            found[status]["headers"] = {"Retry-After": seconds}
    return found


def replies(whole: type[Shape], chunk: type[Shape]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that generates: whole answers, or a stream of chunks.

    A stream's schema is that of what each of its events carries, one after another."""
    one = [{"$ref": REFERENCE.format(model=shape.__name__)} for shape in (chunk, ErrorAnswer)]
    event = {
        "description": 'The `data` of an event. "[DONE]" is the last, an error the last but one.',
        "anyOf": [*one, {"const": "[DONE]"}],
    }
    streamed = {"text/event-stream": {"schema": event}}
    said = 'The answer; with `"stream": true` as server-sent events'
    return {200: {"model": whole, "description": said, "content": streamed}, **refusals(*POSTED)}


def chunk_schemas() -> dict[str, Any]:
    """Component schemas of the chunks, which FastAPI does not collect: no route returns one."""
    chunks: list[tuple[type[BaseModel], Literal["serialization"]]] = [
        (ChatChunk, "serialization"),
        (TextChunk, "serialization"),
    ]
    _, schema = models_json_schema(chunks, ref_template=REFERENCE)
    return dict(schema["$defs"])
