"""
Engines without a model, for the tests of everything that talks to one.

`ScriptedEngine` has the signature of nanochat.engine.Engine.generate and says what it was told to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nanochat.sampling import Sampling
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
                    assert self.gate.wait(timeout=10), "the test never opened the gate"
                time.sleep(self.delay)
                self.num_yielded += 1
                token, mask = steps[i % len(steps)]
                yield [token], [mask]
        finally:
            self._running -= 1
            self.closed.set()
