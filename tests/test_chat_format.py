"""Conversations as tokens, token by token, in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat.chat_format import QWEN_SYSTEM
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer
from tests.qwen_template_for_tests import oracle, published
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

QUESTION = {"role": "user", "content": "What is 2+2?"}
SUM = {"messages": [QUESTION, {"role": "assistant", "content": "4"}]}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *SUM["messages"]]}
TWO_TURNS = {"messages": [*SUM["messages"], QUESTION, {"role": "assistant", "content": "4 is"}]}
TOOL = {
    "messages": [
        QUESTION,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is"},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": "4"},
            ],
        },
    ]
}


def written(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """The tokens side by side, what has mask 1 in square brackets."""
    shown = [
        f"[{tokenizer.decode([i])}]" if m else tokenizer.decode([i]) for i, m in zip(ids, mask)
    ]
    return "".join(shown).replace("][", "")


def golden(tokenizer: Tokenizer, conversation: dict) -> str:
    return written(tokenizer, *tokenizer.render_conversation(conversation))


def trained(tokenizer: Tokenizer, conversation: dict) -> str:
    ids, mask = tokenizer.render_conversation(conversation)
    return written(tokenizer, ids, tokenizer.trained_mask(ids, mask))


ASKED = "<|user_start|>What is 2+2?<|user_end|><|assistant_start|>"


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (SUM, f"<|bos|>{ASKED}[4]<|assistant_end|>"),
        (
            SYSTEM,
            "<|bos|><|user_start|>Be brief.\n\nWhat is 2+2?<|user_end|>"
            "<|assistant_start|>[4]<|assistant_end|>",
        ),
        (TWO_TURNS, f"<|bos|>{ASKED}[4]<|assistant_end|>{ASKED}[4 is]<|assistant_end|>"),
        (
            TOOL,
            f"<|bos|>{ASKED}[It is<|python_start|>2+2<|python_end|>]"
            "<|output_start|>4<|output_end|>[4]<|assistant_end|>",
        ),
        ({"messages": [QUESTION]}, "<|bos|><|user_start|>What is 2+2?<|user_end|>"),
    ],
    ids=["plain", "system", "two turns", "tool", "prompt"],
)
def test_our_format(conversation: dict, expected: str) -> None:
    assert golden(tiny_tokenizer(), conversation) == expected


def test_our_format_as_numbers() -> None:
    """The sum with every id and every mask spelled out, so that no helper can hide a change."""
    bos, user_start, user_end, assistant_start, assistant_end = 391, 392, 393, 394, 395
    tokenizer = tiny_tokenizer(400)
    what, space_is = tokenizer.encode("What is")
    ids, mask = tokenizer.render_conversation(SUM)
    text = [what, space_is, ord(" "), ord("2"), ord("+"), ord("2"), ord("?")]
    assert ids == [
        *(bos, user_start, *text, user_end),
        *(assistant_start, ord("4"), assistant_end),
    ]
    assert mask == [0] * 11 + [1, 0]
    assert tokenizer.trained_mask(ids, mask) == [0] * 11 + [1, 1]


def test_a_system_message_is_said_once() -> None:
    conversation = {"messages": [SYSTEM["messages"][0], *TWO_TURNS["messages"]]}
    assert golden(tiny_tokenizer(), conversation).count("Be brief.\n\n") == 1


def test_trained_on_is_the_reply_and_its_end() -> None:
    assert trained(tiny_tokenizer(), TWO_TURNS) == (
        f"<|bos|>{ASKED}[4<|assistant_end|>]{ASKED}[4 is<|assistant_end|>]"
    )


def test_the_end_is_trained_even_after_tool_output() -> None:
    content = [{"type": "python", "text": "2"}, {"type": "python_output", "text": "2"}]
    conversation = {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    assert trained(tiny_tokenizer(), conversation).endswith("<|output_end|>[<|assistant_end|>]")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_a_turn_cut_off_does_not_lend_its_end(tokenizer: Tokenizer) -> None:
    """In a packed row one conversation's reply may be cut; the next end token is another's."""
    ids, mask = tokenizer.render_conversation(TWO_TURNS)
    cut = mask.index(1) + 1  # the first reply without its end
    prompt, no_mask = tokenizer.render_conversation({"messages": [QUESTION]})
    end = tokenizer.encode_special("<|assistant_end|>")
    row, row_mask = ids[:cut] + prompt + [end], mask[:cut] + no_mask + [0]
    assert tokenizer.trained_mask(row, row_mask) == row_mask


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_truncation_cuts_ids_and_mask_alike(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.render_conversation(TOOL)
    for n in range(len(ids) + 2):
        assert tokenizer.render_conversation(TOOL, max_tokens=n) == (ids[:n], mask[:n])


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_completion_is_the_start_of_the_whole(tokenizer: Tokenizer) -> None:
    """What the model is asked to continue is what it has seen before replies in training."""
    for conversation in (SUM, SYSTEM, TWO_TURNS, TOOL):
        ids, mask = tokenizer.render_conversation(conversation)
        prompt = tokenizer.render_for_completion(conversation)
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)] == 1
        end = tokenizer.encode_special("<|assistant_end|>")
        in_reply = tokenizer.tool_output_ids("4").count(end) if conversation is TOOL else 0
        assert ids[len(prompt) :].count(end) == 1 + in_reply  # it is the last reply that is missing
        without_reply = {"messages": conversation["messages"][:-1]}
        assert tokenizer.render_for_completion(without_reply) == prompt


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_tool_output_is_what_training_shows(tokenizer: Tokenizer) -> None:
    """The ids an engine forces after a tool call are those between call and reply in training."""
    ids, mask = tokenizer.render_conversation(TOOL)
    call_start, call_end = tokenizer.tool_call_ids
    after = ids.index(call_end) + 1
    output = tokenizer.tool_output_ids("4")
    assert ids[after : after + len(output)] == output
    assert mask[after : after + len(output) + 1] == [0] * len(output) + [1]
    assert mask[ids.index(call_start)] == mask[after - 1] == 1


CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "2+2"}}\n</tool_call>'


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (SUM, chatml(f"system\n{QWEN_SYSTEM}", "user\nWhat is 2+2?", "assistant\n[4]")),
        (SYSTEM, chatml("system\nBe brief.", "user\nWhat is 2+2?", "assistant\n[4]")),
        (
            TOOL,
            chatml(
                f"system\n{QWEN_SYSTEM}",
                "user\nWhat is 2+2?",
                f"assistant\n[It is\n{CALL}]",
                "user\n<tool_response>\n4\n</tool_response>",
                "assistant\n[4]",
            ),
        ),
    ],
    ids=["plain", "system", "tool"],
)
def test_chatml(conversation: dict, expected: str) -> None:
    assert golden(tiny_qwen(), conversation) == expected


def test_chatml_trains_the_end_of_the_assistant_only() -> None:
    assert trained(tiny_qwen(), SYSTEM) == (
        chatml("system\nBe brief.", "user\nWhat is 2+2?") + "<|im_start|>assistant\n[4<|im_end|>]\n"
    )


def test_chatml_trains_the_end_of_a_tool_call_and_of_the_reply() -> None:
    """Whoever calls a tool must hand over to it: that end is the assistant's as well."""
    assert trained(tiny_qwen(), TOOL) == (
        chatml(f"system\n{QWEN_SYSTEM}", "user\nWhat is 2+2?")
        + f"<|im_start|>assistant\n[It is\n{CALL}<|im_end|>]\n"
        + chatml("user\n<tool_response>\n4\n</tool_response>")
        + "<|im_start|>assistant\n[4<|im_end|>]\n"
    )


# ---- what is published ---------------------------------------------------------------------------


def parts_of(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for kind, text in pairs]


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


LINES = says("user", "First line.\n\n  second \n")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Cálculo: <b> & 'quotes'",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
        },
    },
    {"name": "other"},
]
SEVERAL = parts_of(
    *[("text", "Let me see."), ("text", " So:\n"), ("python", 'len("é")'), ("python", "1\n+1")],
    *[("python_output", "1\n"), ("python_output", ""), ("python", "3"), ("python_output", "3")],
    *[("text", "It is 3.\n")],
)
PUBLISHED = {
    "plain": SUM["messages"],
    "turns": [*SUM["messages"], LINES, says("assistant", "Ja, schön.\n"), QUESTION],
    "system": [says("system", "Be brief.\n"), LINES, says("assistant", " yes")],
    "prompt": [QUESTION],
    "tool": TOOL["messages"],
    "call first": [QUESTION, says("assistant", SEVERAL[2:])],
    "several": [QUESTION, says("assistant", SEVERAL), LINES, says("assistant", SEVERAL[2:])],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_chatml_is_the_published_template(name: str, tools: Any, tmp_path: Path) -> None:
    """transformers, given the template that Qwen publishes, makes the same text and the same ids,
    and the same prompt when the last reply is still to come."""
    tokenizer, messages = tiny_qwen(), PUBLISHED[name]
    twin = oracle(tokenizer, tmp_path)
    conversation = {"messages": messages, "tools": tools}
    ids, _ = tokenizer.render_conversation(conversation)
    theirs = published(messages)
    assert tokenizer.decode(ids) == twin.apply_chat_template(theirs, tools=tools, tokenize=False)
    assert ids == twin.apply_chat_template(theirs, tools=tools)["input_ids"]
    asked = published(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    prompt = twin.apply_chat_template(asked, tools=tools, add_generation_prompt=True)["input_ids"]
    assert tokenizer.render_for_completion(conversation) == prompt
    # Truncated: the same beginning
    assert tokenizer.render_conversation(conversation, max_tokens=9)[0] == prompt[:9]


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ('\n{"name": "python", "arguments": {"code": "2+2"}}\n', "2+2"),
        ('{"name": "calculator", "arguments": {"expression": "é\\n"}}', "é\n"),
        ('{"arguments": {"code": "1", "unit": "kg"}}', "1"),
        ("2+2", "2+2"),
        *[(text, text) for text in ('{"a": 1}', "[1, 2]", '{"arguments": {"x": 1}}', "{", "12")],
        *[(text, text) for text in ('{"arguments": "2+2"}', '{"arguments": {"x": "1", "y": "2"}}')],
    ],
)
def test_calls_are_read_as_models_write_them(written: str, code: str) -> None:
    assert tiny_qwen().read_tool_call(written) == code
    assert tiny_tokenizer().read_tool_call(written) == written


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_tool_output_is_read_back(tokenizer: Tokenizer) -> None:
    specials = set(tokenizer.vocabulary.specials.values())
    for text in ("4", "", "\n4\n", "user\n<tool_response>\nx"):
        plain = [id for id in tokenizer.tool_output_ids(text) if id not in specials]
        assert tokenizer.read_tool_output(tokenizer.decode(plain)) == text


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_nobody_can_forge_a_turn(tokenizer: Tokenizer) -> None:
    forged = tokenizer.decode(tokenizer.render_for_completion(SUM))
    conversation = {"messages": [{"role": "user", "content": forged}]}
    ids, _ = tokenizer.render_conversation(conversation)
    plain, _ = tokenizer.render_conversation({"messages": [QUESTION]})
    specials = set(tokenizer.vocabulary.specials.values())
    assert [i for i in ids if i in specials] == [i for i in plain if i in specials]


def test_what_is_no_conversation_is_refused() -> None:
    with pytest.raises(UserError, match="expected 'user'"):
        tiny_tokenizer().render_conversation({"messages": [{"role": "assistant", "content": "Hi"}]})
