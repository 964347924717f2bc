"""
Talk to a model in the terminal.

    python -m scripts.chat_cli                          # a conversation; /clear begins anew
    python -m scripts.chat_cli -p "What is 27 + 15?"    # one answer, then exit
    python -m scripts.chat_cli -i rl -g d20 -t 0        # another stage, always the likeliest token

Replies appear while they are made; what the model had calculated stands in brackets. Ctrl-C stops a
reply, at the prompt it ends the program (Ctrl-D and /quit too).
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from nanochat import distributed, flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.serve.stream import Event, ReplyStream

DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"
HELP = "/clear forgets the conversation, /quit ends it, Ctrl-C stops a reply"


@dataclass
class Args(flags.DeviceFlags):
    """Talks to a trained model in the terminal."""

    source: Annotated[flags.Source, flags.alias("-i")] = "sft"
    """Stage whose checkpoint is used."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Which model of that stage, for example d20; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Which checkpoint of that model; default: the last."""
    temperature: Annotated[float, flags.alias("-t")] = 0.6
    """How freely tokens are chosen; 0: always the likeliest."""
    top_k: Annotated[int, flags.alias("-k")] = 50
    """Sample among the k likeliest tokens; 0: among all."""
    max_new_tokens: Annotated[int, flags.alias("-m")] = 256
    """Longest reply, in tokens."""
    prompt: Annotated[str, flags.alias("-p")] = ""
    """Answer this and exit; empty: a conversation."""
    seed: int = 42
    """Seed of the sampling: the same conversation gets the same replies."""


class Chat:
    """A conversation with a model: what was said, and the next reply."""

    def __init__(self, engine: Any, tokenizer: Any, context: int, args: Args) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.context = context  # tokens that the model can take in, its reply included
        self.args = args
        self.messages: list[dict[str, Any]] = []
        self.color = sys.stdout.isatty()

    def ask(self, text: str) -> None:
        """Prints the reply to `text` while it is made, and remembers both."""
        question = {"role": "user", "content": text}
        prompt, dropped = self.fit([*self.messages, question])
        self.messages = self.messages[dropped:]
        if dropped:
            turns = f"{dropped // 2} oldest exchange{'s' if dropped > 2 else ''}"
            self.note(f"(the {self.context} tokens of context are full: forgot the {turns})\n")
        reply = ReplyStream(self.tokenizer)
        try:
            self.show(reply, prompt)
        finally:
            # A reply that was interrupted was said as far as it went; an empty one was not said.
            if any(p["text"] for p in reply.parts if p["type"] != "python_output"):
                self.messages += [question, {"role": "assistant", "content": reply.parts}]

    def fit(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """The prompt's token ids, and how many of the oldest messages were left out to leave room
        for a reply. UserError if the last message alone is too long."""
        room = min(self.args.max_new_tokens, self.context // 2)  # a long reply must not eat it all
        for dropped in range(0, len(messages), 2):
            ids = self.tokenizer.render_for_completion({"messages": messages[dropped:]})
            if len(ids) + room <= self.context:
                return ids, dropped
        raise UserError(
            f"this message has {len(ids)} tokens; the model's context is {self.context}, "
            f"of which {room} are kept for the reply. Say it shorter"
        )

    def show(self, reply: ReplyStream, prompt: list[int]) -> None:
        """Generates and prints one reply."""
        turn = len(self.messages) // 2  # the same question asked twice may get two answers
        events = reply.run(
            self.engine,
            prompt,
            max_tokens=min(self.args.max_new_tokens, self.context - len(prompt)),
            temperature=self.args.temperature,
            top_k=self.args.top_k or None,
            seed=self.args.seed + turn,
        )
        call = ""  # a tool call waiting for its output
        for kind, text in events:
            call = self.show_event((kind, text), call)
        print(flush=True)

    def show_event(self, event: Event, call: str) -> str:
        """Prints one event; returns the tool call that is now waiting for its output."""
        kind, text = event
        # A model can write any character, also those that would command the terminal.
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
        if call:
            self.note(f"[calculator: {call} = {text}] " if kind == "tool_output" else f"[{call}]")
        if kind == "text":
            print(text, end="", flush=True)
        elif kind == "tool":
            return text
        elif kind == "end" and text == "length":
            self.note(" [cut: --max_new_tokens or the context was reached]")
        return ""

    def note(self, text: str) -> None:
        """Prints what is not the model's text, dimmed where the terminal can."""
        print(f"{DIM}{text}{PLAIN}" if self.color else text, end="", flush=True)

    def loop(self) -> None:
        """Asks for messages until /quit, Ctrl-C or Ctrl-D."""
        self.note(f"{HELP}\n")
        ask_for = f"\n{BOLD}You:{PLAIN} " if self.color else "\nYou: "
        while True:
            try:
                text = input(ask_for).strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if text in ("/quit", "/exit"):
                return
            if text == "/clear":
                self.messages = []
                self.note("(a new conversation)\n")
            elif text.startswith("/") and " " not in text:
                self.note(f"{HELP}\n")
            elif text:
                self.answer(text)

    def answer(self, text: str) -> None:
        """One turn of the loop: neither an interruption nor a message too long ends it."""
        print("\nAssistant: ", end="", flush=True)
        try:
            self.ask(text)
        except KeyboardInterrupt:
            self.note(" [stopped]\n")
        except UserError as e:
            self.note(f"({e})\n")


def main(args: Args) -> None:
    """Loads the model, then answers --prompt or talks."""
    if sys.stdin is None and not args.prompt:
        raise UserError("standard input is closed, so nothing can be typed: use --prompt='...'")
    with distributed.session(args.device_type, args.seed) as info:
        model, tokenizer, _ = load_model(
            args.source, info.device, model_tag=args.model_tag, step=args.step
        )
        engine = Engine(model, tokenizer)
        chat = Chat(engine, tokenizer, model.config.sequence_len, args)
        if args.prompt:
            chat.ask(args.prompt)
            return
        if sys.stdin.isatty():
            with suppress(ImportError):  # Windows has its own line editing
                import readline  # noqa: F401  # arrow keys and history in input()
        chat.loop()


if __name__ == "__main__":
    flags.run(main, Args)
