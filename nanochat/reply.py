"""
From sampled tokens to what a person reads: text as it grows, tool calls as whole pieces.

The terminal and the server show a reply while it is made; evaluations and rewards read it when it
is done. All need the same care: a character whose UTF-8 bytes fall into two tokens is held back
until it is whole, what may be the beginning of a stop string too, a tool call is no text, and every
reply ends exactly once, with a reason. That care lives here, in `ReplyStream`:

    reply = ReplyStream(tokenizer, stop=("\n\n",))
    for kind, text in reply.run(engine, prompt_ids, max_tokens=256, temperature=0.6, seed=1):
        ...  # ("text", "It is "), ("tool", "27+15"), ("tool_output", "42"), ..., ("end", "stop")

`split_reply` reads a whole reply at once; `fit_conversation` makes room for the next one. Floor 2.
"""

from __future__ import annotations

import codecs
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

from nanochat.common import UserError
from nanochat.conversation import Message, Part, reply_text

EventKind = Literal["text", "tool", "tool_output", "end"]
Event = tuple[EventKind, str]

# Kinds of conversation parts (conversation.py) -> kinds of events.
_EVENT_OF_PART: dict[str, EventKind] = {
    "text": "text",
    "python": "tool",
    "python_output": "tool_output",
}


class ReplyStream:
    """One assistant reply, taken in token by token.

    Attributes, valid at any moment: `num_tokens` fed so far (forced tool output and the terminal
    token count too), `first_at` (when the first came, by time.monotonic; None before), `parts` (the
    reply as conversation parts, ready to be put into the history), `reason` ("" while running, then
    "stop": the model ended by itself or wrote a stop string, or "length": it was cut)."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), trust_marks: bool = False) -> None:
        """`stop`: the text ends before the first of these, looked for in each stretch of text.
        `trust_marks`: what stands between the marks of tool output is taken for it even if the
        model wrote them; else such a forgery is shown as the text that it is."""
        self.num_tokens = 0
        self.first_at: float | None = None
        self.parts: list[Part] = []
        self.reason = ""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        try:
            self._call_start, self._call_end = tokenizer.tool_call_ids
            self._gap = tokenizer.tool_call_gap
        except UserError:  # a vocabulary without tokens for calls
            self._call_start, self._call_end, self._gap = -1, -1, ""
        self._output_marks = _output_marks(tokenizer) if trust_marks else ()
        self._held = ""  # the gap, or a stop string's beginning, until it is known what follows
        self._inside = "text"
        self._marked = False  # inside of output that the model's own marks enclose
        self._tool_text = ""  # a tool call is shown whole: half an expression tells nobody anything
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def text(self) -> str:
        """The readable text so far, without tool calls and their outputs."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def feed(self, token: int, mask: int = 1) -> list[Event]:
        """Takes the next token and returns what became visible, often nothing or one event.

        `mask` is the engine's: 0 for tokens it forced, which are the output of a tool. What the
        model writes itself is never shown as one, whatever marks it puts around it."""
        if self.reason:
            return []
        self.num_tokens += 1
        if self.first_at is None:
            self.first_at = time.monotonic()
        events: list[Event] = []
        forced = mask == 0
        if forced and self._inside != "python_output":
            events += self._enter("python_output")
        elif not forced and self._inside == "python_output" and not self._marked:
            events += self._enter("text")
        if not forced and token in self._tokenizer.stop_token_ids:
            return events + self.finish("stop")
        if not forced and token == self._call_start:
            return events + self._enter("python")
        if not forced and token == self._call_end:
            return events + self._enter("text")
        if not forced and token in self._output_marks:
            self._marked = token == self._output_marks[0]
            return events + self._enter("python_output" if self._marked else "text")
        text = self._utf8.decode(_text_bytes(self._tokenizer, token))
        if self._inside == "text":
            return events + self._take_text(self._held + text)
        self._tool_text += text
        return events

    def _take_text(self, text: str) -> list[Event]:
        """Shows text, but for an end of it that may turn out to be no text."""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self._held = ""
            self._utf8.reset()
            return self._emit("text", text[: min(found)]) + self.finish("stop")
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if self._gap and text.endswith(self._gap):
            held = max(held, len(self._gap))
        shown = len(text) - held
        self._held = text[shown:]
        return self._emit("text", text[:shown])

    def finish(self, reason: str = "length") -> list[Event]:
        """Ends the reply: whatever was held back comes out, then ("end", reason). Once only."""
        if self.reason:
            return []
        events = self._enter("text")
        self.reason = reason
        return [*events, ("end", reason)]

    def run(
        self,
        engine: Any,
        prompt: list[int],
        is_cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """Generates one reply to `prompt`, event by event; `sampling` goes to engine.generate.

        `is_cancelled` is asked before every token; once it says yes, the stream stops without an
        "end". Closing this generator closes the engine's, so its cache is given back at once."""
        with closing(engine.generate(prompt, num_samples=1, **sampling)) as steps:
            for tokens, masks in steps:
                if is_cancelled is not None and is_cancelled():
                    return
                yield from self.feed(tokens[0], masks[0])
                if self.reason:
                    return
        yield from self.finish("length")

    def _enter(self, kind: str) -> list[Event]:
        """Closes the part we are inside and goes on in another. An unfinished character becomes
        U+FFFD, a tool call or its output is shown."""
        rest = self._utf8.decode(b"", final=True)
        inside, self._inside = self._inside, kind
        self._marked = self._marked and kind == "python_output"
        if inside == "text":
            held, self._held = self._held, ""
            if kind == "python" and self._gap and not rest:
                held = held.removesuffix(self._gap)
            return self._emit("text", held + rest)
        text, self._tool_text = self._tool_text + rest, ""
        if inside == "python":
            text = self._tokenizer.read_tool_call(text)
        elif inside == "python_output":
            text = self._tokenizer.read_tool_output(text)
        return self._emit(inside, text)

    def _emit(self, kind: str, text: str) -> list[Event]:
        """Records `text` in the parts and returns it as an event. Empty text is nobody's event; a
        tool that printed nothing still did run."""
        if kind == "text" and not text:
            return []
        if kind == "text" and self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"type": kind, "text": text})
        return [(_EVENT_OF_PART[kind], text)]


def _text_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes a reader sees of a token: none of a special one, nor of an id past the vocabulary
    (padded embedding rows)."""
    sizes = tokenizer.token_bytes
    return tokenizer.decode_bytes([token]) if token < len(sizes) and sizes[token] else b""


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with, all of `stop` not among them."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _output_marks(tokenizer: Any) -> tuple[int, ...]:
    """The tokens around tool output; none where the format has no such (ChatML)."""
    try:
        start, end = (tokenizer.encode_special(f"<|output_{x}|>") for x in ("start", "end"))
    except (KeyError, UserError):
        return ()
    return start, end


def split_reply(
    tokenizer: Any, ids: Sequence[int], mask: Sequence[int] | None = None
) -> tuple[str, list[Part]]:
    """(text, parts) of a whole reply's ids, the prompt not among them.

    parts are text, python and python_output as in a conversation; text is the text parts joined,
    what the reader sees. mask 0 marks forced tokens, which are tool output in every chat format.
    Output that the model made up, marks and all, is no text either: it earns nothing."""
    reply = ReplyStream(tokenizer, trust_marks=True)
    for i, token in enumerate(ids):
        reply.feed(token, 1 if mask is None else mask[i])
    reply.finish()
    return reply_text(reply.parts), reply.parts


def fit_conversation(
    tokenizer: Any, messages: Sequence[Message], context: int, room: int
) -> tuple[list[int], int]:
    """(prompt ids, dropped): the conversation without its oldest exchanges, as many messages as had
    to go to leave `room` of the `context` tokens for the reply. A system message stays.

    UserError if the last message alone is too long."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = list(messages[len(system) :])

    def render(dropped: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*system, *turns[dropped:]]})

    # Halving, as a prompt only gets shorter: rendering anew for each of thousands of exchanges
    # would take a server's time away from everybody.
    choices = range(0, len(turns), 2)
    at = bisect_left(choices, True, key=lambda n: len(render(n)) + room <= context)
    if at < len(choices):
        return render(choices[at]), choices[at]
    raise UserError(
        f"this message has {len(render(choices[-1]))} tokens; the model's context is {context}, "
        f"of which {room} are kept for the reply. Say it shorter"
    )
