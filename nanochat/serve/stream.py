"""
From sampled tokens to what a person reads: text as it grows, tool calls as whole pieces.

The terminal (scripts/chat_cli.py) and the server (serve/api.py) show a reply while it is made. Both
need the same care: a character whose UTF-8 bytes fall into two tokens is held back until it is
whole, a calculator call is no text, and every reply ends exactly once, with a reason. That care
lives here, in `ReplyStream`:

    reply = ReplyStream(tokenizer)
    for kind, text in reply.run(engine, prompt_ids, max_tokens=256, temperature=0.6, seed=1):
        ...  # ("text", "It is "), ("tool", "27+15"), ("tool_output", "42"), ..., ("end", "stop")
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Literal

from nanochat.common import UserError

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
    token count too), `parts` (the reply as conversation parts, ready to be put into the history),
    `reason` ("" while running, then "stop": the model ended by itself, or "length": it was cut)."""

    def __init__(self, tokenizer: Any) -> None:
        self.num_tokens = 0
        self.parts: list[dict[str, str]] = []
        self.reason = ""
        self._tokenizer = tokenizer
        try:
            self._call_start, self._call_end = tokenizer.tool_call_ids
            self._gap = tokenizer.tool_call_gap
        except UserError:  # a vocabulary without tokens for calls
            self._call_start, self._call_end, self._gap = -1, -1, ""
        self._held = ""  # the gap, until it is known whether a call follows
        self._inside = "text"
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
        events: list[Event] = []
        if mask == 0 and self._inside != "python_output":
            events += self._enter("python_output")
        elif mask == 1 and self._inside == "python_output":
            events += self._enter("text")
        if mask == 1 and token in self._tokenizer.stop_token_ids:
            return events + self.finish("stop")
        if mask == 1 and token == self._call_start:
            return events + self._enter("python")
        if mask == 1 and token == self._call_end:
            return events + self._enter("text")
        text = self._utf8.decode(_text_bytes(self._tokenizer, token))
        if self._inside == "text":
            text, self._held = self._held + text, ""
            if self._gap and text.endswith(self._gap):
                text, self._held = text.removesuffix(self._gap), self._gap
            return events + self._emit("text", text)
        self._tool_text += text
        return events

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
        if inside == "text":
            held, self._held = "" if kind == "python" else self._held, ""
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
