"""
Engines without a model, for the tests of everything that talks to one.

`ScriptedEngine` has the signature of nanochat.engine.Engine.generate and says what it was told to;
`ScriptedScheduler` does so with the interface of nanochat.scheduler.Scheduler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Token
from nanochat.tokenizer import Tokenizer


def script_of(tokenizer: Tokenizer, content: str | list[dict[str, str]]) -> list[tuple[int, int]]:
    """(token, mask) steps of an engine whose model replies `content` and then stops."""
    prompt = {"messages": [{"role": "user", "content": "x"}]}
    messages = [*prompt["messages"], {"role": "assistant", "content": content}]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    end = max(i for i, id in enumerate(ids) if id == tokenizer.encode_special("<|assistant_end|>"))
    mask[end] = 1  # the engine's mask: what was sampled. An earlier end, in ChatML, was forced
    start = len(tokenizer.render_for_completion(prompt))
    return list(zip(ids[start : end + 1], mask[start : end + 1], strict=True))


class ScriptedEngine:
    """Replies with the scripts in turn (the last one for ever), and remembers how it was asked."""

    device = None

    def __init__(
        self, *scripts: list[tuple[int, int]], endless: bool = False, delay: float = 0.0
    ) -> None:
        self.scripts = list(scripts)
        self.endless = endless  # repeats its script until max_tokens
        self.delay = delay  # seconds a token takes
        self.calls: list[dict[str, Any]] = []
        self.num_yielded = 0
        self.most_at_once = 0
        self.closed = threading.Event()
        self.gate: threading.Event | None = None  # if set, every token waits for it
        self._running = 0

    def generate(
        self,
        tokens: list[int],
        *,
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        call = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k}
        if sampling is not None:
            call = asdict(sampling)
            max_tokens = sampling.max_tokens
        call["seed"] = seed
        self.calls.append({"tokens": list(tokens), "num_samples": num_samples, **call})
        steps = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            for i in range(max_tokens if self.endless else min(max_tokens, len(steps))):
                if self.gate is not None:
                    assert self.gate.wait(timeout=60), "the test never opened the gate"
                time.sleep(self.delay)
                self.num_yielded += 1
                token, mask = steps[i % len(steps)]
                yield [token], [mask]
        finally:
            self._running -= 1
            self.closed.set()


class ScriptedScheduler:
    """Runs a ScriptedEngine's scripts, many at once, as the real one runs a model."""

    def __init__(self, engine: ScriptedEngine, max_batch: int) -> None:
        self.engine, self.max_batch = engine, max_batch
        self._open: list[tuple[Request, list[tuple[int, int]]]] = []
        self._num = 0

    @property
    def running(self) -> int:
        return min(len(self._open), self.max_batch)

    @property
    def waiting(self) -> int:
        return len(self._open) - self.running

    def add(self, prompt: list[int], sampling: Sampling, num_samples: int = 1) -> list[Request]:
        engine = self.engine
        asked = {"tokens": list(prompt), "num_samples": num_samples, "sampling": sampling}
        engine.calls.append({**asked, **asdict(sampling)})
        steps = engine.scripts.pop(0) if len(engine.scripts) > 1 else engine.scripts[0]
        requests = [Request(self._num + s, prompt, sampling) for s in range(num_samples)]
        self._num += num_samples
        self._open += [(request, steps) for request in requests]
        return requests

    def step(self) -> list[Token]:
        engine = self.engine
        if engine.gate is not None:
            assert engine.gate.wait(timeout=60), "the test never opened the gate"
        time.sleep(engine.delay)
        engine.most_at_once = max(engine.most_at_once, self.running)
        tokens = []
        for request, steps in self._open[: self.max_batch]:
            at = len(request.tokens)
            id, mask = steps[at % len(steps)]
            request.tokens.append(id)
            engine.num_yielded += 1
            if at + 1 == len(steps) and not engine.endless:
                request.reason = "stop"
            elif at + 1 == request.sampling.max_tokens:
                request.reason = "length"
            tokens.append(Token(request, id, mask, None, None, last=bool(request.reason)))
        self._open = [item for item in self._open if not item[0].reason]
        return tokens

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        if not request.reason:
            request.reason = reason
            self._open = [item for item in self._open if item[0] is not request]
            self.engine.closed.set()


class BrokenScheduler(ScriptedScheduler):
    """Fails at a request's second token."""

    def step(self) -> list[Any]:
        tokens = super().step()
        if any(len(token.request.tokens) == 2 for token in tokens):
            raise RuntimeError("secret detail")
        return tokens
