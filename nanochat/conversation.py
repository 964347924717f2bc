"""
What a conversation is, checked in one place.

    {"messages": [{"role": "system", "content": "Be brief."},            # optional, first only
                  {"role": "user", "content": "What is 2+2?"},           # then user and assistant
                  {"role": "assistant", "content": [                     # in turn
                      {"type": "python", "text": "2+2"},                 # a tool call
                      {"type": "python_output", "text": "4"},            # what the tool said
                      {"type": "text", "text": "4"}]}]}                  # what the user reads

`content` is a string or a list of parts; only an assistant may call tools. A conversation may end
with the user (a prompt) or with the assistant (a training example). "tools" beside "messages" is a
list of function descriptions, for formats that announce tools (ChatML); other keys (source, answer,
...) are left alone. Every reader of conversations, from a jsonl line to a chat
request, passes them through `check_conversation`: the code behind it takes the shape for granted.

Floor 0: imports only common.
"""

from __future__ import annotations

from typing import Any

from nanochat.common import UserError

Conversation = dict[str, Any]
Message = dict[str, Any]
Part = dict[str, str]
Tool = dict[str, Any]
Content = str | list[Part]

PART_TYPES = ("text", "python", "python_output")


def check_conversation(conversation: Any, where: str) -> Conversation:
    """Returns `conversation` unchanged if it is one; raises UserError otherwise.

    `where` is named in the error: "file.jsonl:12", or what else helps the user to find it."""
    if not isinstance(conversation, dict) or "messages" not in conversation:
        raise UserError(
            f'{where}: expected an object with "messages", found {_brief(conversation)}. '
            'A conversation looks like {"messages": [{"role": "user", "content": "Hi"}, '
            '{"role": "assistant", "content": "Hello!"}]}'
        )
    messages = conversation["messages"]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f'{where}: "messages" must be a non-empty list, found {_brief(messages)}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f'{where}: message {i} must have "role" and "content", found {_brief(message)}'
            )
    roles = [message["role"] for message in messages]
    offset = 1 if roles[0] == "system" else 0  # turns are counted without the system message
    if len(roles) == offset:
        raise UserError(f"{where}: only a system message, nobody speaks")
    for i, role in enumerate(roles[offset:]):
        expected = "user" if i % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(
                f"{where}: message {i + offset} has role {_brief(role)}, expected {expected!r}: "
                "a system message may come first, then user and assistant take turns"
            )
    for i, message in enumerate(messages):
        _check_content(message["content"], message["role"], f"{where}: message {i}")
    tools = conversation.get("tools") or []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'{where}: "tools" must be a list of objects, found {_brief(tools)}')
    return conversation


def _check_content(content: Any, role: str, where: str) -> None:
    """Raises UserError unless `content` is what this role may say."""
    if isinstance(content, str):
        if not content:
            raise UserError(f"{where} ({role}) is empty")
        return
    if not isinstance(content, (list, tuple)):
        raise UserError(
            f"{where} ({role}): content must be a string or a list of parts, "
            f"found {_brief(content)}"
        )
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(
                f'{where} ({role}): a part must be {{"type": ..., "text": ...}} with text as a '
                f"string, found {_brief(part)}"
            )
        if part.get("type") not in PART_TYPES:
            raise UserError(
                f"{where} ({role}): part type {_brief(part.get('type'))} is not one of "
                + ", ".join(PART_TYPES)
            )
        if role != "assistant" and part["type"] != "text":
            raise UserError(f"{where}: a {role} message cannot have a {part['type']} part")
    # A tool may print nothing, but someone who speaks must say something
    if not any(part["text"] for part in content if part["type"] != "python_output"):
        raise UserError(f"{where} ({role}) is empty")


def _brief(value: Any) -> str:
    """`value` as it would be typed, short enough for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def as_parts(content: Content) -> list[Part]:
    """Content as a list of parts; a plain string is one text part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content)


def reply_text(content: Content) -> str:
    """What the reader sees: the text parts joined as they are, no tool calls and no output."""
    return "".join(part["text"] for part in as_parts(content) if part["type"] == "text")
