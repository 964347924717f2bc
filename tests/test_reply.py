"""What a reader sees of a reply: token by token, whole, and what of a conversation still fits."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.reply import ReplyStream, fit_conversation
from nanochat.tokenizer import Tokenizer
from tests.engines_for_tests import ScriptedEngine, script_of
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

TOOL_REPLY = [
    {"type": "text", "text": "27 + 15 = "},
    {"type": "python", "text": "27+15"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "42."},
]


def joined(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbouring text events as one: how text is cut into tokens is the tokenizer's business."""
    result: list[tuple[str, str]] = []
    for kind, text in events:
        if kind == "text" and result and result[-1][0] == "text":
            result[-1] = ("text", result[-1][1] + text)
        else:
            result.append((kind, text))
    return result


def feed_all(reply: ReplyStream, steps: list[tuple[int, int]]) -> list[tuple[str, str]]:
    return [event for token, mask in steps for event in reply.feed(token, mask)]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_tool_calls_come_whole_and_apart_from_the_text(tokenizer: Tokenizer) -> None:
    steps = script_of(tokenizer, TOOL_REPLY)
    reply = ReplyStream(tokenizer)
    events = feed_all(reply, steps)
    assert joined(events) == [
        ("text", "27 + 15 = "),
        ("tool", "27+15"),
        ("tool_output", "42"),
        ("text", "42."),
        ("end", "stop"),
    ]
    assert reply.parts == TOOL_REPLY  # so the history renders to the very tokens that were sampled
    assert reply.text == "27 + 15 = 42."


def test_text_streams_while_it_grows() -> None:
    tokenizer = tiny_tokenizer()
    steps = script_of(tokenizer, "The harbour town")
    events = feed_all(ReplyStream(tokenizer), steps)
    assert len([e for e in events if e[0] == "text"]) == len(steps) - 1  # all but the end token


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
@pytest.mark.parametrize("text", ["a\n\nb", "a\n", "\n", "\n\n\na\n\n"])
def test_line_feeds_are_text_where_no_call_follows(tokenizer: Tokenizer, text: str) -> None:
    """In ChatML a line feed stands before a call; it is held back until it is known to be text."""
    reply = ReplyStream(tokenizer)
    assert joined(feed_all(reply, script_of(tokenizer, text))) == [("text", text), ("end", "stop")]
    assert reply.text == text
    cut = ReplyStream(tokenizer)
    steps = script_of(tokenizer, text)[:-1]
    assert joined(feed_all(cut, steps) + cut.finish()) == [("text", text), ("end", "length")]


def test_a_character_in_two_tokens_is_held_back_until_whole() -> None:
    tokenizer = tiny_tokenizer(265)  # bytes only: every character beyond ASCII is split
    reply = ReplyStream(tokenizer)
    text = "é🙂東"
    events = feed_all(reply, script_of(tokenizer, text))
    assert events == [("text", "é"), ("text", "🙂"), ("text", "東"), ("end", "stop")]


def test_a_character_that_never_becomes_whole_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer(265)
    reply = ReplyStream(tokenizer)
    half = tokenizer.encode("🙂")[:2]
    assert [reply.feed(id) for id in half] == [[], []]
    assert reply.finish() == [("text", "\ufffd"), ("end", "length")]


def test_a_reply_ends_once() -> None:
    tokenizer = tiny_tokenizer()
    reply = ReplyStream(tokenizer)
    assert reply.feed(tokenizer.encode_special("<|assistant_end|>")) == [("end", "stop")]
    assert reply.feed(tokenizer.encode("more")[0]) == []
    assert reply.finish() == []
    assert (reply.reason, reply.num_tokens, reply.parts) == ("stop", 1, [])


def test_what_the_model_writes_is_never_shown_as_tool_output() -> None:
    tokenizer = tiny_tokenizer()
    names = ["<|output_start|>", "<|output_end|>"]
    start, end = (tokenizer.encode_special(name) for name in names)
    forged = [start, *tokenizer.encode("99"), end]
    reply = ReplyStream(tokenizer)
    assert joined(feed_all(reply, [(id, 1) for id in forged])) == [("text", "99")]


def test_special_tokens_and_padded_rows_have_no_text() -> None:
    tokenizer = tiny_tokenizer()
    reply = ReplyStream(tokenizer)
    assert reply.feed(tokenizer.encode_special("<|user_start|>")) == []
    assert reply.feed(tokenizer.get_vocab_size() + 7) == []


def test_an_unfinished_tool_call_is_not_lost() -> None:
    tokenizer = tiny_tokenizer()
    steps = script_of(tokenizer, TOOL_REPLY)
    cut = [id for id, _ in steps].index(tokenizer.encode_special("<|python_end|>"))
    reply = ReplyStream(tokenizer)
    events = feed_all(reply, steps[:cut]) + reply.finish()
    assert joined(events)[-2:] == [("tool", "27+15"), ("end", "length")]


def test_a_tool_that_prints_nothing_keeps_its_part() -> None:
    tokenizer = tiny_tokenizer()
    parts = [{"type": "python", "text": "x"}, {"type": "python_output", "text": ""}]
    reply = ReplyStream(tokenizer)
    feed_all(reply, script_of(tokenizer, parts))
    assert reply.parts == parts


def test_run_passes_the_sampling_on_and_ends_by_length() -> None:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(script_of(tokenizer, "The harbour town of Selby"))
    reply = ReplyStream(tokenizer)
    events = list(reply.run(engine, [1, 2], max_tokens=3, temperature=0.5, top_k=7, seed=9))
    assert events[-1] == ("end", "length")
    assert reply.num_tokens == 3
    sampling = {"max_tokens": 3, "temperature": 0.5, "top_k": 7, "seed": 9}
    assert engine.calls == [{"tokens": [1, 2], "num_samples": 1, **sampling}]


def test_run_stops_when_cancelled_and_closes_the_engine() -> None:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(script_of(tokenizer, "harbour"), endless=True)
    reply = ReplyStream(tokenizer)
    events = list(reply.run(engine, [1], lambda: engine.num_yielded > 4, max_tokens=100))
    assert engine.num_yielded == 5 and engine.closed.is_set()
    assert not [event for event in events if event[0] == "end"]


# ---- stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(265), tiny_tokenizer(), tiny_qwen()])
@pytest.mark.parametrize(
    "text, stop, shown",
    [
        ("one, two, three", [","], "one"),
        ("one, two, three", ["three", "two"], "one, "),  # the first in the text counts
        ("aaab", ["aab"], "a"),  # a beginning that comes to nothing, and a new one inside of it
        ("ababac", ["abac"], "ab"),
        ("é🙂東x", ["東"], "é🙂"),
        ("a\n\nb", ["\n\n"], "a"),
        ("one tw", ["two"], None),  # held back, and shown when nothing more comes
        ("one", ["o"], ""),
    ],
)
def test_text_ends_before_a_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str], shown: str | None
) -> None:
    reply = ReplyStream(tokenizer, stop)
    events = joined(feed_all(reply, script_of(tokenizer, text)))
    wanted = text if shown is None else shown
    assert events == [*([("text", wanted)] if wanted else []), ("end", "stop")]
    assert reply.text == wanted


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = tiny_tokenizer(265)  # bytes
    reply = ReplyStream(tokenizer, ["END"])
    seen = [reply.feed(id) for id in tokenizer.encode("xENEND")]
    texts = ["".join(text for kind, text in events if kind == "text") for events in seen]
    assert texts == ["x", "", "", "EN", "", ""]
    assert reply.reason == "stop" and reply.num_tokens == 6
    half = ReplyStream(tokenizer, ["END"])
    assert half.feed(tokenizer.encode("E")[0]) == []
    assert half.finish() == [("text", "E"), ("end", "length")]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_stop_strings_are_looked_for_in_text_alone(tokenizer: Tokenizer) -> None:
    """Not in a call, nor in its output, nor across them."""
    reply = ReplyStream(tokenizer, ["27+15", "= 42."])
    assert joined(feed_all(reply, script_of(tokenizer, TOOL_REPLY)))[-2:] == [
        ("text", "42."),
        ("end", "stop"),
    ]
    assert reply.parts == TOOL_REPLY


# ---- conversations that fit ----------------------------------------------------------------------


def talk(*texts: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_qwen])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_oldest_exchanges_go_first_and_the_system_message_stays(make: Any, system: str) -> None:
    tokenizer = make()
    messages = talk("one " * 9, "two " * 9, "three " * 9, "four " * 9, "five", system=system)
    first = len(messages) - 5
    for dropped in (0, 2, 4):
        kept = [*messages[:first], *messages[first + dropped :]]
        wanted = tokenizer.render_for_completion({"messages": kept})
        context = len(wanted) + 10
        assert fit_conversation(tokenizer, messages, context, 10) == (wanted, dropped)
        if dropped < 4:
            assert fit_conversation(tokenizer, messages, context - 1, 10)[1] == dropped + 2
    with pytest.raises(UserError, match=rf"has {len(wanted)} tokens.*{context - 1}, of which 10"):
        fit_conversation(tokenizer, messages, context - 1, 10)
