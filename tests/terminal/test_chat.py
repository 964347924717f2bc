"""The conversation behind chat_cli: turns, seeds, a full context, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import UserError
from nanochat.finetune import load_mixtures
from nanochat.sampling import Sampling
from nanochat.terminal.chat import Chat
from scripts import chat_sft
from tests.engines_for_tests import ScriptedEngine, script_of
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOOL_REPLY = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "27+15"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "42."},
]


def chat_with(*replies: Any, context: int = 512, **sampling: Any) -> tuple[Chat, ScriptedEngine]:
    engine = ScriptedEngine(*(script_of(TOKENIZER, reply) for reply in replies))
    return Chat(engine, TOKENIZER, Sampling(**sampling), context), engine


def ask(chat: Chat, text: str) -> list[tuple[str, str]]:
    chat.say(text)
    return list(chat.reply())


def prompt_of(engine: ScriptedEngine, call: int) -> str:
    return TOKENIZER.decode(engine.calls[call]["tokens"])


def test_what_was_said_is_in_the_next_prompt_until_clear() -> None:
    chat, engine = chat_with("One.", TOOL_REPLY, "Three.")
    chat.system = "Be brief."
    ask(chat, "Hello")
    assert ("tool_output", "42") in ask(chat, "Again")
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "One."}]},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": TOOL_REPLY},
    ]
    assert "Hello" in prompt_of(engine, 1) and "One." in prompt_of(engine, 1)
    chat.clear()
    ask(chat, "Last")
    assert "Hello" not in prompt_of(engine, 2) and "Be brief." in prompt_of(engine, 2)


def test_an_answer_has_its_numbers() -> None:
    chat, engine = chat_with(TOOL_REPLY)
    engine.delay = 0.001
    ask(chat, "What is 27 + 15?")
    answer = chat.answer
    assert answer is not None and (answer.text, answer.parts) == ("It is 42.", TOOL_REPLY)
    assert answer.tokens == len(script_of(TOKENIZER, TOOL_REPLY)) and answer.reason == "stop"
    rest = answer.seconds - answer.first_token_seconds
    assert answer.first_token_seconds >= 0.001 and rest >= 0.001 * (answer.tokens - 1) * 0.99
    assert answer.tokens_per_second == pytest.approx((answer.tokens - 1) / rest, rel=0.05)


def test_a_question_again_gets_another_seed_and_takes_the_old_reply_back() -> None:
    chat, engine = chat_with("One.", "Two.", "Three.", "Four.", seed=5)
    ask(chat, "Hello")
    ask(chat, "And?")
    assert chat.take_back() == "And?"
    ask(chat, "And?")
    seeds = [call["seed"] for call in engine.calls]
    assert seeds[:2] == [5, 6] and len(set(seeds)) == 3
    assert prompt_of(engine, 1) == prompt_of(engine, 2)
    assert [m["content"] for m in chat.turns[::2]] == ["Hello", "And?"]
    assert chat.turns[3]["content"][0]["text"] == "Three."
    chat.clear()
    with pytest.raises(UserError, match="nothing was asked"):
        chat.take_back()
    ask(chat, "Hello")
    assert engine.calls[-1]["seed"] == 5  # the same conversation, the same replies


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_message_stays() -> None:
    chat, engine = chat_with("harbour " * 5, context=128, max_tokens=32)
    chat.system = "Be brief."
    dropped = []
    for i in range(8):
        dropped.append(chat.say(f"Question {i}: what is the capital of France?"))
        list(chat.reply())
    # What is forgotten is not forgotten again: in the end one exchange goes for each that comes
    assert dropped[0] == 0 and dropped[-3:] == [2, 2, 2]
    assert chat.answer is not None and chat.answer.dropped_messages == 2
    assert all(len(call["tokens"]) + call["max_tokens"] <= 128 for call in engine.calls)
    for part in ("Question 7", "Question 6", "Be brief."):
        assert part in prompt_of(engine, 7)
    assert "Question 0" not in prompt_of(engine, 7)
    assert [m["role"] for m in chat.messages[:3]] == ["system", "user", "assistant"]


def test_a_message_that_cannot_fit_changes_nothing() -> None:
    chat, engine = chat_with("One.", context=64)
    ask(chat, "Hello")
    before = list(chat.turns)
    with pytest.raises(UserError, match="context is 64"):
        chat.say("harbour " * 200)
    assert chat.turns == before and len(engine.calls) == 1
    assert chat.take_back() == "Hello"


def test_a_reply_that_is_stopped_was_said_as_far_as_it_went() -> None:
    chat, engine = chat_with("The harbour town of Selby", "Two.")
    chat.say("Hello")
    with closing(chat.reply()) as events:
        first = [next(events)[1], next(events)[1]]
    assert engine.closed.is_set()
    assert chat.turns[1]["content"] == [{"type": "text", "text": "".join(first)}]
    assert chat.answer is not None and chat.answer.reason == "cancelled"
    ask(chat, "Again")
    assert "".join(first) in prompt_of(engine, 1)


def test_an_empty_reply_is_not_remembered_but_can_be_asked_again() -> None:
    chat, engine = chat_with("One.")
    engine.scripts = [[(TOKENIZER.encode_special("<|assistant_end|>"), 1)]]
    ask(chat, "Hello")
    assert chat.turns == []
    assert chat.take_back() == "Hello"


def test_stop_strings_end_a_reply() -> None:
    chat, _ = chat_with("One. Two. Three.", stop=(" Two",))
    ask(chat, "Hello")
    assert chat.answer is not None and (chat.answer.text, chat.answer.reason) == ("One.", "stop")


# ---- files


def test_a_saved_conversation_comes_back(tmp_path: Path) -> None:
    chat, _ = chat_with("Café.", TOOL_REPLY)
    chat.system = "Be brief."
    ask(chat, "Hello \ud800")  # half a surrogate pair, as a broken name of a file has it
    ask(chat, "What is 27 + 15?")
    path = chat.save(str(tmp_path / "talk"))
    assert path == tmp_path / "talk.jsonl"
    other, engine = chat_with("Three.", "Four.")
    assert other.load(str(tmp_path / "talk")) == ""
    assert (
        other.messages[2:] == chat.messages[2:] and other.messages[1]["content"] == "Hello \ufffd"
    )
    ask(other, "And?")
    assert "Be brief." in prompt_of(engine, 0) and "27+15" in prompt_of(engine, 0)
    assert other.save() == path  # it is the same conversation, further on
    assert len(json.loads(path.read_text(encoding="utf-8"))["messages"]) == 7
    other.load(str(path))
    assert other.take_back() == "And?" and len(other.turns) == 4


def test_chat_sft_learns_from_what_was_saved(tmp_path: Path) -> None:
    chat, _ = chat_with(TOOL_REPLY, "Two.")
    chat.system = "Be brief."
    ask(chat, "What is 27 + 15?")
    ask(chat, "And?")
    chat.save(str(tmp_path / "chats" / "first"))
    said = chat.messages
    chat.clear()
    ask(chat, "Another")
    path = chat.save(str(tmp_path / "chats" / "second"))
    data = [f"--data={path.parent}", f"--val_data={path}", "--mixture=", "--val_mixture="]
    train, val, _ = load_mixtures(flags.parse(chat_sft.Args, data))
    assert len(train) == 1 and train[0]["messages"] == said
    assert val is not None and val[0]["messages"] == chat.messages
    TOKENIZER.render_conversation(train[0])


def test_without_a_name_it_is_saved_in_the_base_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    chat, _ = chat_with("One.")
    with pytest.raises(UserError, match="nothing was said yet"):
        chat.save()
    ask(chat, "Hello")
    path = chat.save()
    assert path.parent == tmp_path / "chats" and path.suffix == ".jsonl"
    assert chat.save() == path


def test_another_conversations_file_is_not_written_over(tmp_path: Path) -> None:
    chat, _ = chat_with("One.")
    ask(chat, "Hello")
    path = tmp_path / "mine.jsonl"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.jsonl is there already"):
        chat.save(str(path))
    assert path.read_text(encoding="utf-8") == "precious"
    with pytest.raises(UserError, match="cannot be written"):
        chat.save(str(path / "below.jsonl"))


def bad_files() -> Iterator[Any]:
    yield pytest.param("", "is empty", id="empty")
    yield pytest.param("{", "not valid JSON", id="broken")
    yield pytest.param("[1]", 'expected an object with "messages"', id="no conversation")
    row = {"messages": [{"role": "assistant", "content": "Hi"}]}
    yield pytest.param(json.dumps(row), "expected 'user'", id="wrong order")


@pytest.mark.parametrize(("content", "said"), list(bad_files()))
def test_a_file_without_a_conversation_leaves_all_as_it_was(
    content: str, said: str, tmp_path: Path
) -> None:
    chat, _ = chat_with("One.")
    ask(chat, "Hello")
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        chat.load(str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        chat.load(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no name of a file"):
        chat.load("~no-such-user/x")
    assert len(chat.turns) == 2


def test_a_question_without_a_reply_is_handed_out(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    row = {"messages": messages, "source": "elsewhere"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    chat, _ = chat_with("One.")
    assert chat.load(str(tmp_path / "x.jsonl")) == "Who?"
    assert chat.messages == []
