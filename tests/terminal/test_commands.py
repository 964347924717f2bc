"""The commands of the chat in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.sampling import Sampling
from nanochat.terminal.chat import Chat
from nanochat.terminal.commands import (
    COMMANDS,
    SETTINGS,
    is_command,
    message_of,
    run_command,
)
from tests.engines_for_tests import ScriptedEngine, script_of
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def chat() -> Chat:
    """A conversation of one exchange."""
    chat = Chat(ScriptedEngine(script_of(TOKENIZER, "Hi.")), TOKENIZER, Sampling(), 512)
    chat.say("Hello")
    list(chat.reply())
    return chat


@pytest.mark.parametrize("text", ["/help", "/foo bar", "/system\nTwo lines", "/? ", "/TEMP 1"])
def test_a_slash_and_a_word_are_a_command(text: str) -> None:
    assert is_command(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/etc/passwd", "/etc/passwd"),
        ("/ alone", "/ alone"),
        ("//help", "/help"),
        ('"""/help"""', "/help"),
        ('"""\n  a\n"""', "a"),
        ('"""', ""),
        (" what is /help? ", "what is /help?"),
    ],
)
def test_all_else_is_said_to_the_model(text: str, said: str) -> None:
    assert not is_command(text)
    assert message_of(text) == said


def test_settings_change_and_are_shown(chat: Chat) -> None:
    assert run_command(chat, "/temp 0.25").note == "(temperature 0.25)"
    assert run_command(chat, "/temp").note == "(temperature 0.25)"
    assert run_command(chat, "/set top-p 0.9").note == "(top_p 0.9)"
    run_command(chat, "/set max_new_tokens 7")
    run_command(chat, "/set stop The end")
    sampling = Sampling(temperature=0.25, top_p=0.9, max_tokens=7, stop=("The end",))
    assert chat.sampling == sampling
    shown = run_command(chat, "/set").note
    assert all(name in shown for name in SETTINGS) and "(top_k 0)" in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/temp -1", r"temperature=-1.0 must be 0 \(always the likeliest\) or more"),
        ("/temp warm", "temperature warm: this must be a number"),
        ("/temp nan", "temperature=nan must be"),
        ("/set top_k 1.5", "must be a whole number"),
        ("/set size 3", "no setting size; there are temperature"),
        ("/clera", "did you mean /clear?"),
        ("/xyz", "/help lists"),
        ("/load", "/load FILE"),
    ],
)
def test_what_cannot_be_done_is_said(chat: Chat, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_command(chat, text)
    assert chat.sampling == Sampling() and len(chat.turns) == 2


def test_the_conversation_is_cleared_saved_and_loaded(chat: Chat, tmp_path: Path) -> None:
    said = list(chat.turns)
    assert run_command(chat, "/system Be brief").note == "(the system message is set)"
    assert chat.system == "Be brief"
    note = run_command(chat, f"/save {tmp_path}/with a space").note
    assert note == f"(saved in {tmp_path}/with a space.jsonl)"
    assert "the system message stays" in run_command(chat, "/clear").note
    assert chat.turns == []
    assert run_command(chat, "/system").note == "(no system message)"
    note = run_command(chat, f"/load {tmp_path}/with a space").note
    assert note.startswith("(loaded 1 exchange from ")
    assert chat.turns == said and chat.system == "Be brief"


def test_a_question_is_asked_again(chat: Chat) -> None:
    assert run_command(chat, "/retry").ask == "Hello"
    assert chat.turns == []


def test_help_names_them_all_and_quit_ends(chat: Chat) -> None:
    assert all(name in run_command(chat, "/?").note for name in COMMANDS)
    for text in ("/quit", "/exit"):
        with pytest.raises(EOFError):
            run_command(chat, text)
