"""
The shapes of OpenAI's answers, whole and in chunks, for a conversation and for a plain text.

A tool call has no place in them; `show_tool` writes it as Markdown, for clients that know only
text. Knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from nanochat.serve.worker import Choice, Job, Piece, TokenScore


class Answer:
    """What both shapes have in common: one answer to one request."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, job: Job, extra: dict[str, Any] | None = None) -> None:
        self.job = job
        self._scores: dict[int, list[TokenScore]] = {c.index: [] for c in job.choices}
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            **(extra or {}),
        }

    def note(self, piece: Piece) -> None:
        """Remembers what the whole answer needs of a piece."""
        self._scores[piece.index] += piece.scores

    def whole(self) -> dict[str, Any]:
        """The answer, all its replies ended."""
        choices = [
            {
                "index": choice.index,
                **self.content(choice),
                "logprobs": self.logprobs(self._scores[choice.index]),
                "finish_reason": choice.reply.reason or "stop",
            }
            for choice in self.job.choices
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them."""
        prompt, completion = self.job.num_prompt_tokens, self.job.num_tokens
        total = prompt + completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), **more}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A piece, as a chunk's choice."""
        reason = piece.text if piece.kind == "end" else None
        scores = self.logprobs(piece.scores) if piece.scores else None
        return {
            "index": piece.index,
            **self.delta(piece),
            "logprobs": scores,
            "finish_reason": reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the chunks that a stream begins with."""
        raise NotImplementedError

    def content(self, choice: Choice) -> dict[str, Any]:
        """What a whole choice says."""
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        """What a chunk's choice says."""
        raise NotImplementedError

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Log-probabilities; None where they were not asked for."""
        raise NotImplementedError


class ChatAnswer(Answer):
    """/v1/chat/completions"""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, tools_as_text: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tools_as_text = tools_as_text

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in self.job.choices
        ]

    def content(self, choice: Choice) -> dict[str, Any]:
        parts = choice.reply.parts
        has_tools = any(part["type"] != "text" for part in parts)
        text = show_parts(parts) if self.tools_as_text else choice.reply.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if has_tools:
            message["parts"] = parts
        return {"message": message}

    def delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "end":
            return {"delta": {}}
        if piece.kind == "text":
            return {"delta": {"content": piece.text}}
        if self.tools_as_text:
            return {"delta": {"content": show_tool(piece.kind, piece.text)}}
        kind = "python" if piece.kind == "tool" else "python_output"
        return {"delta": {"tool": {"type": kind, "text": piece.text}}}

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.job.sampling.logprobs is None:
            return None
        content = [
            {
                **_scored(score.text, score.logprob),
                "top_logprobs": [_scored(text, logprob) for text, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}


class TextAnswer(Answer):
    """/v1/completions"""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> list[dict[str, Any]]:
        return []

    def content(self, choice: Choice) -> dict[str, Any]:
        return {"text": show_parts(choice.reply.parts)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind in ("text", "end"):
            return {"text": piece.text if piece.kind == "text" else ""}
        return {"text": show_tool(piece.kind, piece.text)}

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.job.sampling.logprobs is None:
            return None
        return {
            "tokens": [_readable(score.text) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                {_readable(text): logprob for text, logprob in score.top} for score in scores
            ],
            # bytes of the reply before each token: a token may end within a character
            "text_offset": [score.start for score in scores],
        }


def show_parts(parts: Sequence[dict[str, str]]) -> str:
    """A reply as text alone, its tool calls as Markdown."""
    return "".join(
        part["text"] if part["type"] == "text" else show_tool(part["type"], part["text"])
        for part in parts
    )


def show_tool(kind: str, text: str) -> str:
    """A tool call or its output as Markdown: `27+15` → `42`, or fenced where it has lines."""
    is_call = kind in ("tool", "python")
    # A fence longer than any within, so that the text cannot end it.
    longest = max(map(len, re.findall("`+", text)), default=0)
    if "\n" in text or longest:
        fence = "`" * max(3, longest + 1)
        return f"\n{fence}{'python' if is_call else 'text'}\n{text}\n{fence}\n"
    return f"`{text}`" if is_call else f" → `{text}` "


def _scored(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _readable(text), "logprob": logprob, "bytes": list(text)}


def _readable(text: bytes) -> str:
    return text.decode("utf-8", "replace")
