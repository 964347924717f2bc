"""What passes as a conversation, and what each mistake is told."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.conversation import as_parts, check_conversation, reply_text

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}


def part(type: str, text: str = "x") -> dict[str, str]:
    return {"type": type, "text": text}


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT, USER],
        [USER, {"role": "assistant", "content": [part("python"), part("python_output", "")]}],
        [{"role": "user", "content": [part("text")]}, ASSISTANT],
    ],
)
def test_good_conversations_come_back_as_they_are(messages: list[Any]) -> None:
    conversation = {"messages": messages, "source": "here"}
    assert check_conversation(conversation, "x") is conversation


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("Hi", "expected an object with \"messages\", found 'Hi'"),
        ({"text": "Hi"}, 'expected an object with "messages"'),
        ({"messages": []}, "non-empty list, found []"),
        ({"messages": "Hi"}, "non-empty list, found 'Hi'"),
        ({"messages": ["Hi"]}, 'message 0 must have "role" and "content"'),
        ({"messages": [{"role": "user"}]}, 'message 0 must have "role" and "content"'),
        ({"messages": [SYSTEM]}, "only a system message"),
        ({"messages": [ASSISTANT]}, "message 0 has role 'assistant', expected 'user'"),
        ({"messages": [USER, USER]}, "message 1 has role 'user', expected 'assistant'"),
        ({"messages": [USER, SYSTEM]}, "message 1 has role 'system', expected 'assistant'"),
        ({"messages": [SYSTEM, ASSISTANT]}, "message 1 has role 'assistant', expected 'user'"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1 has role 'bot'"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 0 (user) is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "a string or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "found {'type': 'text'}"),
        ({"messages": [{"role": "user", "content": [part("image")]}]}, "'image' is not one of"),
        (
            {"messages": [{"role": "user", "content": [part("python")]}]},
            "cannot have a python part",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [part("python_output")]}]},
            "message 1 (assistant) is empty",
        ),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, "message 1 (assistant) is"),
        ({"messages": [USER], "tools": "python"}, '"tools" must be a list of objects'),
        ({"messages": [USER], "tools": ["python"]}, "found ['python']"),
    ],
)
def test_errors_name_the_place_and_what_was_found(value: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        check_conversation(value, "chats.jsonl:12")
    assert str(error.value).startswith("chats.jsonl:12: ")
    assert told in str(error.value)


def test_errors_stay_short() -> None:
    with pytest.raises(UserError) as error:
        check_conversation({"messages": [{"role": "user", "content": ["x" * 10_000]}]}, "here")
    assert len(str(error.value)) < 300


def test_parts_and_text() -> None:
    assert as_parts("Hi") == [{"type": "text", "text": "Hi"}]
    parts = [part("text", "It is "), part("python", "1+1"), part("python_output", "2")]
    assert as_parts(parts) == parts
    assert reply_text([*parts, part("text", "2.")]) == "It is 2."
    assert reply_text("Hi") == "Hi"
