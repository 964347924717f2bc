"""ReplyStream: what a reader sees of a reply, token by token."""

from __future__ import annotations

import pytest

from nanochat.serve.stream import ReplyStream
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
