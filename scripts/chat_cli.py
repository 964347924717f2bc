"""
Talk to a model in the terminal.

    python -m scripts.chat_cli                          # a conversation; /help lists the commands
    python -m scripts.chat_cli -i rl -g d20 -t 0        # another stage, always the likeliest token
    python -m scripts.chat_cli -p "What is 27 + 15?"    # one answer, then exit
    echo "What is 27 + 15?" | python -m scripts.chat_cli --json          # one JSON object, a line
    cat notes.txt | python -m scripts.chat_cli -p "Summarise:"           # joins both

Replies appear while they are made; what a tool was asked and said stands in brackets. Ctrl-C stops
a reply; on an empty line it ends the program, with exit status 130 (Ctrl-D and /quit: 0). What was
typed is kept in $NANOCHAT_BASE_DIR/chat_history, for the Up key and Ctrl-R. With --json an error is
{"error": "..."} and exit status 1. The conversation and its commands: nanochat/terminal/.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass

from nanochat import distributed, flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, get_base_dir
from nanochat.engine import Engine, Scheduler
from nanochat.precision import choose_precision
from nanochat.serving import make_ready
from nanochat.terminal.chat import Chat
from nanochat.terminal.commands import COMMANDS, is_command, message_of, run_command
from nanochat.terminal.keyboard import make_reader, piped
from nanochat.terminal.options import TerminalFlags, sampling_of
from nanochat.terminal.screen import Screen

INTERRUPTED = 130  # exit status of what Ctrl-C ended


@dataclass
class Args(TerminalFlags):
    """Talks to a trained model in the terminal."""

    errors_as_json = True  # what flags.run does with --json, also before main is reached


def answer(chat: Chat, screen: Screen, text: str) -> bool:
    """Prints the reply to `text` while it is made; False if Ctrl-C stopped it."""
    if dropped := chat.say(text) // 2:
        exchanges = f"{dropped} oldest exchange{'s' if dropped > 1 else ''}"
        screen.note(f"(the {chat.context} tokens of context are full: forgot the {exchanges})")
    try:
        with closing(chat.reply()) as events:
            screen.show(events)
    except KeyboardInterrupt:
        screen.note(" [stopped]")
        return False
    finally:
        screen.speed(chat.answer)
    return True


def answer_as_json(chat: Chat, text: str) -> bool:
    """The same as one line of JSON, which is ASCII: nothing in it commands a terminal."""
    chat.say(text)
    whole = True
    try:
        with closing(chat.reply()) as events:
            for _ in events:
                pass
    except KeyboardInterrupt:
        whole = False
    assert chat.answer is not None
    print(json.dumps(asdict(chat.answer)), flush=True)
    return whole


def talk(chat: Chat, screen: Screen, read: Callable[[], str]) -> int:
    """Asks for messages until Ctrl-C or Ctrl-D at the prompt, or /quit; returns the exit status.
    Neither a reply that is stopped nor a message that cannot be answered ends it."""
    while True:
        try:
            text = read()
            if is_command(text):
                outcome = run_command(chat, text)
                if outcome.note:
                    screen.note(outcome.note)
                text = outcome.ask
            else:
                text = message_of(text)
            if text:
                print("\nAssistant: ", end="", flush=True)
                answer(chat, screen, text)
        except UserError as e:
            screen.note(f"({e})")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            return INTERRUPTED


def start(args: Args) -> int:
    """Loads the model, then answers one message or talks; returns the exit status."""
    sampling = sampling_of(args)
    question = "\n\n".join(part for part in (args.prompt, piped()) if part)
    talks = not question and sys.stdin is not None and sys.stdin.isatty()
    if not question and not talks:
        raise UserError('nothing to answer: the standard input is empty; ask with -p "..."')
    if talks and args.json:
        raise UserError('--json gives one answer: ask with -p "...", or through a pipe')
    with distributed.session(args.device_type, args.seed) as info:
        model, tokenizer, meta = load_model(
            args.source, info.device, model_tag=args.model_tag, step=args.step
        )
        model = make_ready(model, choose_precision(args.dtype, info.device).dtype, args.quantize)
        engine = Engine(model, tokenizer, tools=args.tools, step=args.decoding)
        if args.decoding != "plain":
            Scheduler(engine, max_batch=1).warm_up()
        chat = Chat(engine, tokenizer, sampling, model.config.sequence_len)
        chat.system = args.system
        if args.json:
            return 0 if answer_as_json(chat, question) else INTERRUPTED
        screen = Screen(args.tools)
        if question:
            return 0 if answer(chat, screen, question) else INTERRUPTED
        screen.note(f"{args.source} {meta['tag']}, step {meta['step']}. /help lists the commands")
        return talk(chat, screen, make_reader(get_base_dir() / "chat_history", COMMANDS))


def main(args: Args) -> None:
    """Ends the program as a shell expects it: quietly, with an exit status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a test's
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an old code page
    try:
        status = start(args)
    except BrokenPipeError:  # `| head`: nobody reads on, and nobody is to be told at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if status:
        sys.exit(status)


if __name__ == "__main__":
    flags.run(main, Args)
