"""chat_cli: one answer, through a pipe and as JSON; and a conversation on a terminal."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import get_base_dir
from scripts import chat_cli
from scripts.chat_cli import Args
from tests.conftest import REPO
from tests.engines_for_tests import ScriptedEngine
from tests.scripts.checkpoints_for_tests import save_tiny
from tests.terminals_for_tests import Terminal

# The chat with an engine that repeats what it heard (see there)
ECHO = "from tests.scripts.chat_for_tests import main; main()"


def run_chat(*argv: str) -> int:
    """chat_cli in this process; returns the exit status."""
    try:
        flags.run(chat_cli.main, Args, ["--device_type=cpu", *argv])
    except SystemExit as e:
        assert isinstance(e.code, int)
        return e.code
    return 0


@pytest.fixture
def tiny(own_base_dir: Path) -> Path:
    """A base directory with a random model."""
    save_tiny(own_base_dir, "sft")
    return own_base_dir


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Gives this process a pipe as its standard input, with these bytes in it."""
    with ExitStack() as opened:

        def fill(content: bytes) -> None:
            read, write = os.pipe()
            os.write(write, content)
            os.close(write)
            monkeypatch.setattr(sys, "stdin", opened.enter_context(open(read, encoding="utf-8")))

        yield fill


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the program asks, instead of a reply of the model."""
    asked: list[str] = []

    def answer(chat: Any, screen: Any, text: str) -> bool:
        asked.append(text)
        return True

    monkeypatch.setattr(chat_cli, "answer", answer)
    return asked


# ---- one answer


def test_one_answer_is_printed_and_the_seed_decides(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for seed in (1, 1, 2):
        assert run_chat("-p", "Hello", "-m", "20", f"--seed={seed}") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_pipe_is_one_message(
    tiny: Path, pipe: Callable[[bytes], None], questions: list[str]
) -> None:
    pipe("one\ntwö\n".encode())
    assert run_chat() == 0
    pipe(b"\xef\xbb\xbfthe text\n\nof a file\n")
    assert run_chat("-p", "Summarise:") == 0
    assert questions == ["one\ntwö", "Summarise:\n\nthe text\n\nof a file"]


def test_a_file_as_input_is_read_too(
    tiny: Path, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "question").write_text("What?", encoding="utf-8")
    with open(tiny / "question", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_chat() == 0
    with open(os.devnull, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_chat("-p", "And?") == 0
    assert questions == ["What?", "And?"]


def test_no_question_is_an_error_and_text_must_be_text(
    tiny: Path, pipe: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b" \n")
    assert run_chat() == 1
    assert 'ask with -p "..."' in capsys.readouterr().err
    pipe(b"\xff\xfe")
    assert run_chat() == 1
    assert "not UTF-8 text" in capsys.readouterr().err


def test_json_tells_all_about_a_reply(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat("-p", "Hello", "--json", "-m", "5", "--stop=never written") == 0
    line = capsys.readouterr().out
    assert line.endswith("}\n") and line.count("\n") == 1 and line.isascii()
    row = json.loads(line)
    assert row["text"] == "".join(p["text"] for p in row["parts"] if p["type"] == "text")
    assert row["tokens"] == 5 and row["reason"] == "length" and row["dropped_messages"] == 0
    assert 0 < row["first_token_seconds"] <= row["seconds"] and row["tokens_per_second"] > 0
    names = ["text", "parts", "tokens", "seconds", "first_token_seconds", "tokens_per_second"]
    assert list(row) == [*names, "reason", "dropped_messages"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-g", "nope"], "no sft checkpoint with --model_tag=nope"),
        (["-m", "0"], "--max_new_tokens=0 must be at least 1"),
        (["--top_p=0"], "--top_p=0.0 must be above 0"),
        (["-p", "harbour " * 200], "the model's context is 128"),
        (["-p", ""], "nothing to answer"),
    ],
)
def test_an_error_is_json_where_json_was_asked_for(
    tiny: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_chat("-p", "Hello", *argv, "--json") == 1
    shown = capsys.readouterr()
    assert said in json.loads(shown.out)["error"] and shown.err == ""
    assert run_chat("-p", "Hello", *argv) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == ""


def test_the_flags_reach_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine([(1, 1)])
    made: dict[str, Any] = {}

    def make(model: Any, tokenizer: Any, **how: Any) -> ScriptedEngine:
        made.update(how)
        return engine

    monkeypatch.setattr(chat_cli, "Engine", make)
    argv = ["-t", "0.5", "-k", "0", "-m", "9", "--top_p=0.9", "--min_p=0.1", "--seed=5"]
    argv += ["--repetition_penalty=1.2", "--stop=A", "--stop", "B", "--tools=none"]
    assert run_chat("-i", "sft", "-g", "tiny", "-s", "7", "-p", "Hi", "--system=Rhyme", *argv) == 0
    call = engine.calls[0]
    wanted = {"temperature": 0.5, "top_k": None, "max_tokens": 9, "top_p": 0.9, "min_p": 0.1,
              "seed": 5, "repetition_penalty": 1.2, "stop": ("A", "B")}  # fmt: skip
    assert {name: call[name] for name in wanted} == wanted
    assert made == {"tools": "none", "step": "plain"}
    tokenizer = chat_cli.load_model("sft", "cpu")[1]
    assert "Rhyme" in tokenizer.decode(call["tokens"])


def test_a_compiled_step_is_made_before_the_first_question(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine([(1, 1)])
    told: list[Any] = []
    monkeypatch.setattr(chat_cli, "Engine", lambda *_, **how: told.append(how["step"]) or engine)
    monkeypatch.setattr(chat_cli.Scheduler, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(
        chat_cli.Scheduler, "warm_up", lambda _: told.append(("warm", len(engine.calls)))
    )
    assert run_chat("-p", "Hi", "--decoding=compiled") == 0
    assert told == ["compiled", ("warm", 0)] and len(engine.calls) == 1


def test_json_tells_what_ctrl_c_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(chat_cli.Engine):
        def generate(self, *args: Any, **kwargs: Any) -> Iterator[tuple[list[int], list[int]]]:
            for i, step in enumerate(super().generate(*args, **kwargs)):
                if i == 3:
                    raise KeyboardInterrupt
                yield step

    monkeypatch.setattr(chat_cli, "Engine", Interrupted)
    assert run_chat("-p", "Hello", "--json") == 130
    row = json.loads(capsys.readouterr().out)
    assert (row["tokens"], row["reason"]) == (3, "cancelled")


def test_the_program_itself_speaks_json_and_only_that(tiny: Path) -> None:
    command = [sys.executable, "-m", "scripts.chat_cli", "--json", "--device_type=cpu", "-m", "3"]
    done = subprocess.run(
        command, cwd=REPO, input="Hello\nyou", capture_output=True, encoding="utf-8", check=True
    )
    assert json.loads(done.stdout)["tokens"] == 3
    assert done.stderr == ""


def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    command = [sys.executable, "-c", ECHO, "-p", "go on for ever"]
    process = subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"1."
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 1


def test_ctrl_c_during_one_answer(tiny: Path) -> None:
    with Terminal(ECHO, "-p", "go on for ever", "-m", "100000") as terminal:
        terminal.wait_for("1. 'go on for ever'")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        assert terminal.ended() == 130


# ---- a conversation on a terminal


def test_a_conversation(tiny: Path) -> None:
    with Terminal(ECHO) as terminal:
        terminal.wait_for("sft echo, step 3. /help lists the commands")
        ask(terminal, "Hello\r", "1. 'Hello'")
        speed = terminal.wait_for(" s)\n")
        assert "tokens, " in speed and "a second, the first after" in speed

        # Several lines in one message
        ask(terminal, "with\x1b\ralt\r", r"2. 'with\nalt'")
        ask(terminal, "with\\\ra slash\r", r"3. 'with\na slash'")
        ask(terminal, '"""\r/help\r\r  me\\\r"""\r', r"4. '/help\n\n  me\\'")
        ask(terminal, "\x1b[200~one\ntwo\n\x1b[201~\r", r"5. 'one\ntwo'")
        ask(terminal, "//help is a command\r", "6. '/help is a command'")

        # A reply that is stopped was said as far as it went; what was typed before it comes back
        ask(terminal, "go on for ever\r", "7. 'go on for ever' and and")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        ask(terminal, "\x1b[A\x1b[A\x1b[D\x1b[Dn\r", "8. '/help is a commannd'")

        # Commands
        terminal.wait_for("You:")
        terminal.type("/cle\t")
        terminal.wait_for("/clear")
        terminal.type("\r")
        terminal.wait_for("(a new conversation)")
        ask(terminal, "/temp 0\r", "(temperature 0.0)")
        ask(terminal, "/help\r", "/load FILE")
        ask(terminal, "/nothing\r", "there is no command /nothing")

        # Ctrl-C clears what is typed, on an empty line it ends the program
        terminal.wait_for("You:")
        terminal.type("half a quest")
        terminal.wait_for("quest")
        terminal.type("\x03")
        ask(terminal, "Last\r", "1. 'Last'", prompt=False)
        terminal.wait_for("You:")
        terminal.type("\x03")
        assert terminal.ended() == 130
    assert "Traceback" not in terminal.shown


def ask(terminal: Terminal, keys: str, reply: str, prompt: bool = True) -> None:
    """Types keys at the prompt and waits for the reply."""
    if prompt:
        terminal.wait_for("You:")
    terminal.type(keys)
    terminal.wait_for(reply)


def test_history_outlives_the_program_and_is_private(tiny: Path) -> None:
    with Terminal(ECHO) as terminal:
        ask(terminal, "the first one\r", "1. 'the first one'")
        ask(terminal, "the second\r", "2. 'the second'")
        terminal.wait_for("You:")
        terminal.type("\x04")
        assert terminal.ended() == 0
    file = get_base_dir() / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)  # as another program may have left it
    with Terminal(ECHO) as terminal:
        terminal.wait_for("You:")
        terminal.type("\x12first")
        terminal.wait_for("the first one")
        terminal.type("\r")
        terminal.type("\r")
        terminal.wait_for("1. 'the first one'")
        ask(terminal, "/quit\r", "/quit")
        assert terminal.ended() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_dumb_terminal_is_read_by_lines(tiny: Path) -> None:
    with Terminal(ECHO, TERM="dumb") as terminal:
        ask(terminal, "Hello\n", "1. 'Hello'")
        ask(terminal, "a\\\nb\n", r"2. 'a\nb'")
        ask(terminal, '"""\nc\\\nd"""\n', r"3. 'c\\\nd'")
        ask(terminal, "go on for ever\n", "4. 'go on for ever' and and")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        ask(terminal, "more\\\n", "... ")
        terminal.interrupt()
        ask(terminal, "no\n", "5. 'no'")  # what was begun is forgotten
        terminal.wait_for("You:")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert "\x1b" not in terminal.shown


def test_flags_of_old_parse() -> None:
    argv = ["-i", "rl", "-g", "d20", "-s", "7", "-t", "0.5", "-k", "3", "-m", "9", "-p", "hi"]
    args = flags.parse(Args, [*argv, "--device_type", "cpu", "--seed=1"])
    assert (args.source, args.model_tag, args.step, args.prompt) == ("rl", "d20", 7, "hi")
    assert (args.temperature, args.top_k, args.max_new_tokens, args.seed) == (0.5, 3, 9, 1)
    long = "--source rl --model-tag d20 --step 7 --temperature 0.5 --top_k 3"
    assert flags.parse(Args, long.split()).top_k == 3
