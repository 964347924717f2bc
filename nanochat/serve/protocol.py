"""
What a request may say, and how it is refused.

The shapes are OpenAI's, so their clients work against this server. Everything arrives from outside,
so everything is checked here, by pydantic, and refused with an error object that names the
parameter: a request can be wrong, it can never make the server fail. What a model of this file does
not list is refused too: a parameter that is silently ignored is a wrong answer. These models are
also what /openapi.json says. Knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from nanochat.common import UserError
from nanochat.conversation import check_conversation
from nanochat.sampling import Sampling
from nanochat.serve.limits import Limits

# Parameters of OpenAI's that we do not have, with the values that ask for nothing: clients send
# those as defaults. Any other value is refused. null is "not given" everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # of the tools that there are none of
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    # in messages, where clients send an earlier answer back
    "annotations": ([],),
    "tool_calls": ([],),
}


def _whole(text: str) -> str:
    """JSON can smuggle in half a surrogate pair, which no answer could be sent back with."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode: {text[e.start]!a}") from e
    return text


def _few(value: Any) -> Any:
    """Counted before anything within is looked at."""
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise ValueError(f"more than {MAX_KEYS} keys")
    return value


Text = Annotated[str, AfterValidator(_whole)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0)]
T = TypeVar("T")
# One error is enough: half a million of them in a megabyte kept pydantic busy for half a minute.
Many = Annotated[list[T], Field(fail_fast=True)]
MAX_KEYS = 64  # of an object, for the same reason


class ApiError(Exception):
    """A request that is refused, with its HTTP status and headers."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = error_body(message, param, code, kind)


def error_body(
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body(BaseModel):
    """Strict: no text is taken for a number. Closed: what is not listed is refused."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # "model" is a parameter of OpenAI's
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(_few(body), dict):
            return body
        return {
            key if str(key).isascii() else show(key)[1:-1]: value
            for key, value in body.items()
            if value is not None and value not in _NEUTRAL.get(key, ())
        }


class Part(Body):
    """A piece of a message. `python` is a tool call and `python_output` what the tool said; only
    an assistant has those."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(Body):
    """One turn. A system (or developer) message may come first, then user and assistant in turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[Part] | None = None
    parts: Many[Part] | None = None
    """Extension: an assistant's reply with its tool calls, as this server gave it. Stands in for
    `content`, so that a model sees its own calls again."""

    def turn(self) -> dict[str, Any]:
        """The message as conversations of ours have it. Text parts alone are joined."""
        role = "system" if self.role == "developer" else self.role
        content = self.parts if self.parts is not None else self.content
        if isinstance(content, list):
            if all(part.type == "text" for part in content):
                return {"role": role, "content": "".join(part.text for part in content)}
            return {"role": role, "content": [part.model_dump() for part in content]}
        return {"role": role, "content": content}


class StreamOptions(Body):
    """How a stream looks."""

    include_usage: bool = False
    """One more chunk at the end, without choices, with the usage."""
    include_obfuscation: Literal[False] = False


class GenerationRequest(Body):
    """What both ways to ask for text have in common. Where a parameter has no default here, the
    server's own is taken (GET /health names them)."""

    model: Text | None = None
    """Must be the served model's name, if given."""
    n: int = Field(1, ge=1, le=128)
    """Replies to make."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    """Longest reply in tokens. A reply ends at the end of the model's context in any case."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0: always the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    """The same seed and request give the same reply. Not given: another one each time."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = Field(
        default_factory=list
    )
    """The reply ends before the first of these."""
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    """Extension: sample among the k likeliest tokens; 0: among all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Extension: sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Extension: above 1, tokens that were there already become less likely."""
    user: Text | None = None
    """The client's own bookkeeping: accepted, of no effect."""
    metadata: Annotated[dict[Text, Text], BeforeValidator(_few)] | None = None
    """The client's own bookkeeping: accepted, of no effect."""

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives each token comes with; None: no log-probabilities at all."""
        return None

    @property
    def length_asked(self) -> int | None:
        """The longest reply asked for, in tokens."""
        return self.max_tokens

    def check(self, model_name: str, limits: Limits, prompts: int = 1) -> None:
        """Refuses what this model or this server cannot do."""
        if self.model not in (None, model_name):
            message = f"model {show(self.model)} is not served here; this is {model_name!r}"
            raise ApiError(message, "model", "model_not_found", 404)
        if (self.length_asked or 1) > limits.longest:
            name = "max_tokens" if self.max_tokens else "max_completion_tokens"
            raise ApiError(f"{name} must be at most {limits.longest} here", name)
        if self.n * prompts > limits.max_concurrent + limits.max_waiting:
            most = limits.max_concurrent + limits.max_waiting
            raise ApiError(f"n times the prompts must be at most {most} here", "n")

    def sampling(self, limits: Limits, room: int) -> Sampling:
        """How to sample; `room` is what the context leaves for the reply, in tokens."""
        seed = secrets.randbits(63) if self.seed is None else self.seed & (2**63 - 1)
        length = self.length_asked or min(limits.max_new_tokens, limits.longest)
        return Sampling(
            max_tokens=min(length, room),
            temperature=limits.temperature if self.temperature is None else self.temperature,
            top_k=(limits.top_k if self.top_k is None else self.top_k) or None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logprobs=self.top_logprobs_wanted,
        )


class ChatRequest(GenerationRequest):
    """A conversation to be continued."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] = "disabled"
    """Extension (named as in OpenAI's Responses API), for a conversation that no longer fits the
    context. disabled: 400, code context_length_exceeded. auto: the oldest exchanges are dropped,
    the system message is kept; the answer says how many messages in `dropped_messages`."""
    tool_format: Literal["text", "parts"] = "text"
    """Extension: how a tool call that the model makes is shown. text: as Markdown in the content.
    parts: apart from it, as `delta.tool` in a stream. Either way a whole message with tool calls
    has `parts`, its text and tool parts in order."""

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length_asked(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    def check(self, model_name: str, limits: Limits, prompts: int = 1) -> None:
        super().check(model_name, limits, prompts)
        if self.max_tokens and self.max_completion_tokens:
            message = "max_tokens is the old name of max_completion_tokens: send one of them"
            raise ApiError(message, "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")

    def conversation(self) -> dict[str, Any]:
        """The messages as a conversation of ours that ends with the user's turn."""
        last = self.messages[-1].role
        if last != "user":
            raise ApiError(f"the last message must be the user's, not the {last}'s", "messages")
        for i, message in enumerate(self.messages):
            if message.content is None and message.parts is None:
                raise ApiError(f"messages[{i}] has no content", f"messages[{i}].content")
            if message.parts is not None and message.role != "assistant":
                raise ApiError("only an assistant's message has parts", f"messages[{i}].parts")
        try:
            return check_conversation({"messages": [m.turn() for m in self.messages]}, "messages")
        except UserError as e:  # the order of the roles, or an empty message
            raise ApiError(str(e), "messages") from e


class CompletionRequest(GenerationRequest):
    """A text to be continued."""

    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    """A text or several, whose special tokens are plain text; or token ids, taken as they are."""
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError("prompt is empty", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def show(value: Any) -> str:
    """A value from outside, short and in plain ASCII, for an error message."""
    try:
        text = ascii(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def refusal(errors: Sequence[Any]) -> ApiError:
    """What pydantic (through FastAPI) found wrong in a body, as one answer.

    Parameters that we do not have are named all at once; else the one error that says most."""
    errors = [{**e, "loc": [k for k in e["loc"] if k != "body"]} for e in errors]
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    if unknown:
        names = [_path(e["loc"]) for e in unknown]
        message = f"unsupported parameter: {', '.join(names[:10])}. GET /openapi.json lists ours."
        return ApiError(message, names[0], "unsupported_parameter")
    # Of several forms that a value may have, the one that it came closest to failed deepest.
    error = max(errors, key=lambda e: len(e["loc"]))
    if error["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {show(error.get('ctx'))}")
    path = _path(error["loc"])
    if not path:
        if isinstance(error.get("input"), (bytes, str)):
            return ApiError("the body must be JSON, sent as Content-Type: application/json")
        return ApiError(f"the body must be a JSON object: {error['msg']}")
    found = (
        "" if error["type"] in ("missing", "value_error") else f", not {show(error.get('input'))}"
    )
    return ApiError(f"{path}: {error['msg']}{found}", path)


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content", "list[Part]", 1) -> messages[0].content[1]. Names that pydantic
    gives to the forms of a value (str, list[...]) say nothing to the sender."""
    path = ""
    for key in loc:
        if isinstance(key, int):
            path += f"[{key}]"
        elif not path or not (key in ("str", "int") or "[" in key):
            path += ("." if path else "") + (key if key.isascii() else show(key)[1:-1])
    return path[:100]
