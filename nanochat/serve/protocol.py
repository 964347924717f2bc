"""
What a request to /v1/chat/completions may say, and how it is refused.

The shapes are OpenAI's, so their clients work against this server. Everything arrives from outside,
so everything is checked here, by hand, and refused with an error object that names the parameter:
a request can be wrong, it can never make the server fail. Knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import check_conversation

# Parameters of OpenAI's that we do not have, with the values that ask for nothing: clients send
# those as defaults. Any other value would be silently ignored, so it is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_format": ("parts",),  # what a stream has anyway
    "truncation": ("auto", "disabled"),
}
_IGNORED = {"user", "metadata"}  # bookkeeping of the client's own
_KNOWN = {
    *("model", "messages", "stream", "stream_options", "seed"),
    *("temperature", "top_k", "max_tokens", "max_completion_tokens"),
}


@dataclass(frozen=True)
class Limits:
    """What this server allows, and what it takes where a request says nothing."""

    context: int
    """Tokens of conversation and reply together: the model's sequence length."""
    max_tokens: int = 512
    """Length of a reply, where the request names none."""
    temperature: float = 0.8
    top_k: int = 50
    max_waiting: int = 16
    """Requests that may wait behind the one being answered; more get 429."""
    max_body: int = 1 << 20
    """Bytes of one request."""


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    conversation: dict[str, Any]
    temperature: float
    top_k: int | None
    max_tokens: int
    seed: int
    stream: bool
    include_usage: bool


class ApiError(Exception):
    """A request that is refused, with its HTTP status (4xx)."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, param, code)


def error_body(
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_chat_request(raw: bytes, model_name: str, limits: Limits) -> ChatRequest:
    """Checks the bytes of a request and fills in defaults; ApiError says what is wrong."""
    try:
        body = json.loads(raw)
    # Besides broken JSON: bytes that are no UTF-8, numbers of 5,000 digits, 10,000 nested lists.
    except (ValueError, RecursionError) as e:
        raise ApiError(f"the body is not valid JSON: {show(str(e))}") from e
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, not {show(body)}")
    body = {key: value for key, value in body.items() if value is not None}  # null: not given
    _refuse_unsupported(body)
    if body.get("model", model_name) != model_name:
        message = f"model {show(body['model'])} is not served here; this is {model_name!r}"
        raise ApiError(message, "model", "model_not_found", 404)
    length_key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    seed = _integer(body, "seed", -(2**63), 2**63 - 1, secrets.randbits(63))
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict):
        raise ApiError("stream_options must be an object", "stream_options")
    return ChatRequest(
        conversation=_conversation(body),
        temperature=_number(body, "temperature", 0.0, 2.0, limits.temperature),
        top_k=_integer(body, "top_k", 0, 2**31 - 1, limits.top_k) or None,  # 0: no limit
        max_tokens=_integer(body, length_key, 1, limits.context, limits.max_tokens),
        seed=seed & (2**63 - 1),
        stream=_boolean(body, "stream"),
        include_usage=_boolean(stream_options, "include_usage"),
    )


def show(value: Any) -> str:
    """A value from outside, short and in plain ASCII, for an error message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unsupported(body: dict[str, Any]) -> None:
    """Refuses what we would otherwise ignore, all names at once."""
    bad = []
    for key, value in body.items():
        if key in _KNOWN or key in _IGNORED:
            continue
        if key not in _NEUTRAL or value not in _NEUTRAL[key]:
            bad.append(key)
    if bad:
        names = ", ".join(show(key) for key in bad)
        raise ApiError(
            f"unsupported parameter: {names}. This server knows {', '.join(sorted(_KNOWN))}.",
            show(bad[0]).strip("'"),
            "unsupported_parameter",
        )


def _conversation(body: dict[str, Any]) -> dict[str, Any]:
    """The messages as a conversation of ours that ends with the user's turn."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", "messages")
    conversation = {"messages": [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]}
    last = conversation["messages"][-1]["role"]
    if last != "user":
        raise ApiError(f"the last message must be the user's, not the {last}'s", "messages")
    try:
        return check_conversation(conversation, "messages")
    except UserError as e:  # the order of the roles
        raise ApiError(str(e), "messages") from e


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message; content is a string or a list of parts (see `_parts`)."""
    if not isinstance(message, dict):
        raise ApiError(f"{where} must be an object, not {show(message)}", where)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        known = "system, user or assistant"
        raise ApiError(f"{where}.role must be {known}, not {show(role)}", f"{where}.role")
    if isinstance(content, str):
        return {"role": role, "content": _text(content, f"{where}.content")}
    if isinstance(content, list):
        return {"role": role, "content": _parts(content, role, f"{where}.content")}
    message_ = f"{where}.content must be a string or a list of parts, not {show(content)}"
    raise ApiError(message_, f"{where}.content")


def _parts(parts: list[Any], role: str, where: str) -> str | list[dict[str, str]]:
    """Text parts as OpenAI has them are joined. An assistant's may also be python and python_output
    (as `delta.tool` gave them), so that a model sees its own earlier tool calls again."""
    kinds = ("text", "python", "python_output") if role == "assistant" else ("text",)
    checked: list[dict[str, str]] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in kinds:
            raise ApiError(
                f"{where}[{i}].type must be {' or '.join(kinds)} in a message of the {role}'s, "
                f"not {show(kind)}",
                f"{where}[{i}]",
            )
        checked.append({"type": str(kind), "text": _text(part.get("text"), f"{where}[{i}].text")})
    if all(part["type"] == "text" for part in checked):
        return "".join(part["text"] for part in checked)
    return checked


def _text(value: Any, where: str) -> str:
    """A string that is whole Unicode: JSON can smuggle in half a surrogate pair."""
    if not isinstance(value, str):
        raise ApiError(f"{where} must be a string, not {show(value)}", where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ApiError(f"{where} is not valid Unicode: {show(value[e.start])}", where) from e
    return value


def _number(body: dict[str, Any], key: str, low: float, high: float, default: float) -> float:
    """A number from `low` to `high`. (NaN, which Python's JSON lets through, is in no range.)"""
    value = body.get(key, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        raise ApiError(f"{key} must be a number from {low} to {high}, not {show(value)}", key)
    return float(value)


def _integer(body: dict[str, Any], key: str, low: int, high: int, default: int) -> int:
    """A whole number from `low` to `high`. The default is the server's own and not checked."""
    if key not in body:
        return default
    value = body[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ApiError(f"{key} must be a whole number from {low} to {high}, not {show(value)}", key)
    return value


def _boolean(body: dict[str, Any], key: str) -> bool:
    """true or false; not given: false."""
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise ApiError(f"{key} must be true or false, not {show(value)}", key)
    return value
