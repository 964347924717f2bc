"""
A conversation with one model: what was said, the next reply, and its file.

    chat = Chat(engine, tokenizer, Sampling(temperature=0.6), context=2048)
    dropped = chat.say("What is 27 + 15?")        # messages forgotten to make room
    with closing(chat.reply()) as events:
        for kind, text in events: ...             # as nanochat/reply.py tells them
    chat.answer.tokens_per_second

Nothing is printed here. A saved conversation is a jsonl file of one line, in the format of all
conversations (nanochat/conversation.py), so that `chat_sft --data` can learn from it. Floor 4.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write, get_base_dir, read_jsonl, seed_from
from nanochat.conversation import Message, Part, check_conversation, reply_text
from nanochat.reply import Event, ReplyStream, fit_conversation
from nanochat.sampling import Sampling
from nanochat.tokenizer import without_surrogates


@dataclass(frozen=True)
class Answer:
    """One reply, as far as it went, and what it took. Its fields are those of `--json`."""

    text: str
    """What the reader sees: no tool calls, no output."""
    parts: list[Part]
    """The same with the tool calls, as in a conversation."""
    tokens: int
    """Tool output and the token that ends the reply are among them."""
    seconds: float
    first_token_seconds: float
    """Until the first token was there: mostly the time that the prompt takes."""
    tokens_per_second: float
    """Of the tokens after the first; 0 if there are none."""
    reason: str
    """"stop": the model ended, or wrote a stop string; "length": it was cut; "cancelled"."""
    dropped_messages: int
    """Oldest messages that were forgotten to make room."""


class Chat:
    """A conversation, and the model that replies in it.

    Attributes: `system` (the system message; "" for none), `turns` (the other messages), `sampling`
    (how replies are chosen), `answer` (the last reply), `file` (where the conversation was saved or
    loaded from)."""

    def __init__(self, engine: Any, tokenizer: Any, sampling: Sampling, context: int) -> None:
        """`context`: tokens that the model can take in, its reply included."""
        self.engine, self.tokenizer = engine, tokenizer
        self.sampling = sampling
        self.context = context
        self.system = ""
        self.answer: Answer | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets what was said; the system message and the settings stay."""
        self.turns: list[Message] = []
        self.file: Path | None = None
        self.question = ""  # the last one, and the turns before it: for retry
        self._before: list[Message] = []
        self._prompt: list[int] = []
        self._dropped = 0
        self._attempts: Counter[int] = Counter()  # replies made, by their place

    @property
    def messages(self) -> list[Message]:
        """All of the conversation, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def say(self, text: str) -> int:
        """Takes the user's next message; returns how many of the oldest messages had to be
        forgotten. UserError if it cannot fit, which leaves the conversation as it was."""
        room = min(self.sampling.max_tokens, self.context // 2)  # a long reply must not eat it all
        asked = [*self.messages, {"role": "user", "content": text}]
        self._prompt, dropped = fit_conversation(self.tokenizer, asked, self.context, room)
        self.turns = self.turns[dropped:]
        self.question, self._before, self._dropped = text, list(self.turns), dropped
        return dropped

    def reply(self) -> Generator[Event, None, None]:
        """Generates the reply to what was said, event by event. Close it to stop: a reply was said
        as far as it went, an empty one was not said and is not remembered."""
        place = len(self.turns) // 2  # the same question asked twice may get two answers
        attempt = self._attempts[place]
        self._attempts[place] += 1
        # Many people type the seed that they saw elsewhere: the first reply has it as it is
        seed = self.sampling.seed + place
        length = min(self.sampling.max_tokens, self.context - len(self._prompt))
        stream = ReplyStream(self.tokenizer, stop=self.sampling.stop)
        start = time.monotonic()
        try:
            yield from stream.run(
                self.engine,
                self._prompt,
                seed=seed_from(seed, attempt) if attempt else seed,
                sampling=replace(self.sampling, max_tokens=length),
            )
        finally:
            self.answer = _answer(stream, start, self._dropped)
            if any(part["text"] for part in stream.parts if part["type"] != "python_output"):
                question = {"role": "user", "content": self.question}
                reply = {"role": "assistant", "content": stream.parts}
                self.turns = [*self._before, question, reply]

    def take_back(self) -> str:
        """Forgets the last question and its reply; returns the question, to be asked again: it gets
        another reply. UserError if nothing was asked."""
        if not self.question:
            raise UserError("nothing was asked yet")
        self.turns = list(self._before)
        return self.question

    def save(self, name: str = "") -> Path:
        """Writes the conversation; returns the file. Without a name: where it was saved before, or
        a new file in $NANOCHAT_BASE_DIR/chats.

        UserError if nothing was said, or if the file is another conversation's."""
        if not self.turns:
            raise UserError("nothing was said yet")
        path = _path(name) if name else self.file
        if path is None:
            path = get_base_dir() / "chats" / time.strftime("%Y-%m-%d-%H%M%S.jsonl")
        if path.exists() and path != self.file:
            raise UserError(f"{path} is there already; save under another name")
        try:
            with atomic_write(path, "w") as f:
                line = json.dumps({"messages": self.messages}, ensure_ascii=False)
                f.write(without_surrogates(line) + "\n")
        except OSError as e:
            raise UserError(f"{path} cannot be written: {e.strerror or e}") from e
        self.file = path
        return path

    def load(self, name: str) -> str:
        """Goes on with the first conversation of a file. Returns the user's message that stands
        last without a reply, which is left out; "" if there is none.

        UserError if the file has no conversation; then all stays as it was."""
        path = _path(name)
        try:
            found = next(read_jsonl(path), None)
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
        if found is None:
            raise UserError(f"{path} is empty; /save writes a conversation")
        number, row = found
        messages = list(check_conversation(row, f"{path}:{number}")["messages"])
        self.clear()
        self.file = path
        self.system = reply_text(messages.pop(0)["content"]) if _is(messages[0], "system") else ""
        open_question = reply_text(messages.pop()["content"]) if _is(messages[-1], "user") else ""
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        if messages:
            self.question, self._before = reply_text(messages[-2]["content"]), self.turns[:-2]
        return open_question


def _is(message: Message, role: str) -> bool:
    return message["role"] == role


def _path(name: str) -> Path:
    """A file as it was typed: ~ is the home folder, a name without an ending is a jsonl file."""
    try:
        path = Path(name).expanduser()
        return path if path.suffix else path.with_name(path.name + ".jsonl")
    except (RuntimeError, ValueError) as e:  # ~nobody, /
        raise UserError(f"{name} is no name of a file: {e}") from e


def _answer(stream: ReplyStream, start: float, dropped: int) -> Answer:
    end = time.monotonic()
    first = end if stream.first_at is None else stream.first_at
    rate = (stream.num_tokens - 1) / max(end - first, 1e-9) if stream.num_tokens > 1 else 0.0
    return Answer(
        text=stream.text,
        parts=stream.parts,
        tokens=stream.num_tokens,
        seconds=round(end - start, 4),
        first_token_seconds=round(first - start, 4),
        tokens_per_second=round(rate, 2),
        reason=stream.reason or "cancelled",
        dropped_messages=dropped,
    )
