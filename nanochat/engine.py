"""
Inference: replies of a model, streamed or whole, for one prompt or many.

    engine = Engine(model, tokenizer)
    for column, mask in engine.generate(tokens, max_tokens=64): ...
    sequences, masks = engine.generate_batch([tokens_a, tokens_b], num_samples=4)

The loop itself is Scheduler.step (nanochat/scheduler.py), which a server drives by itself; the keys
and values are in nanochat/kv_cache.py, the choice of a token in nanochat/sampling.py, the tools in
nanochat/tools.py. Floor 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from nanochat.common import UserError, seed_from
from nanochat.kv_cache import KVCache
from nanochat.rows import Rows
from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Scheduler, Token
from nanochat.static_step import GraphStep, Step, bucket_of, make_step
from nanochat.tools import Tool, ToolLimits, ToolUse, make_tool

__all__ = ["Engine", "KVCache", "Sampling", "Scheduler"]

TOOL_THREADS = 4  # programs of models that run at once


class Engine:
    """Generates with a model of ours: the raw (uncompiled) module."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tools: str = "calculator",
        limits: ToolLimits | None = None,
        step: str = "plain",
    ) -> None:
        """`tools`: "calculator", "python" (in the sandbox) or "none". `step`: how a token for each
        row is decoded: "plain", "compiled", or on CUDA "graph" (compiled and captured). They pay
        where one scheduler serves for long. UserError if either cannot be had here."""
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = tokenizer.get_vocab_size()  # the model may have more rows; never sampled
        self.stops: set[int] = set(tokenizer.stop_token_ids)
        self.limits = limits or ToolLimits()
        try:
            self.has_tools = len(tokenizer.tool_call_ids) > 0
        except UserError:  # a vocabulary without tokens for calls
            self.has_tools = False
        self.tool: Tool | None = make_tool(tools, self.limits)
        self.has_tools = self.has_tools and self.tool is not None
        self._threads: ThreadPoolExecutor | None = None
        self.step: Step | None = make_step(step, model)

    @property
    def device(self) -> Any:
        """The torch.device on which the model computes."""
        return self.model.get_device()

    # ---- what a scheduler asks for

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, prompt and reply together."""
        return getattr(self.model.config, "sequence_len", None)

    def rows(self, max_batch: int) -> Rows:
        """An empty batch of that many rows at most."""
        if not isinstance(self.step, GraphStep):
            return Rows(self.model, self.vocab_size, step=self.step)
        # Graphs are captured with the cache's memory: it must not move
        most = bucket_of(max_batch)
        return Rows(self.model, self.vocab_size, self.context or 0, most, self.step)

    def tool_use(self) -> ToolUse | None:
        """What follows the tool calls of one reply; None without tools."""
        return ToolUse(self.tokenizer, self.limits) if self.has_tools else None

    def run_tool(self, code: str) -> Future[str | None]:
        """Runs a slow tool in a thread of its own."""
        assert self.tool is not None
        if self._threads is None:
            self._threads = ThreadPoolExecutor(TOOL_THREADS, thread_name_prefix="tool")
        return self._threads.submit(self.tool.run, code)

    # ---- replies

    def _tokens(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        sampling: Sampling,
        seed: int | Sequence[int],
        stopped: Callable[[], bool],
    ) -> Iterator[list[tuple[int, Token]]]:
        """Yields, step by step, (row, token); rows are prompt-major. All run at once, and as far
        beyond the model's context as asked: it is the callers' to know what they do."""
        if sampling.max_tokens < 1 or num_samples < 1:
            return
        if not prompts or not all(prompts):
            raise UserError("a prompt must have at least one token")
        scheduler = Scheduler(self, max_batch=len(prompts) * num_samples, context=-1)
        row_of: dict[Request, int] = {}
        for p, prompt in enumerate(prompts):
            own = seed_from(seed, p) if isinstance(seed, int) else seed[p]
            for request in scheduler.add(prompt, replace(sampling, seed=own), num_samples):
                row_of[request] = len(row_of)
        while (scheduler.running or scheduler.waiting) and not stopped():
            tokens = [(row_of[token.request], token) for token in scheduler.step()]
            if tokens:  # none while all rows wait for their tools
                yield sorted(tokens, key=lambda pair: pair[0])

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 42,
        stopped: Callable[[], bool] = lambda: False,
        log_probs: list[list[float]] | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yields, step by step, (row, token, mask) for the rows still going.

        Rows are prompt-major: row = prompt * num_samples + sample. mask is 1 for a sampled token, 0
        for a forced one (tool output, which comes all in one step). A row ends after a stop token
        or max_tokens tokens. `seed` may be one for each prompt. `log_probs`, a list for each row,
        is added to: the log-probability of each token at temperature 1, 0 for a forced one.
        `sampling` stands for max_tokens, temperature, top_k and all else that a Sampling says, but
        for its seed."""
        chosen = sampling or _plain(max_tokens, temperature, top_k)
        if log_probs is not None and chosen.logprobs is None:
            chosen = replace(chosen, logprobs=0)
        for step in self._tokens(prompts, num_samples, chosen, seed, stopped):
            if log_probs is not None:
                for row, token in step:
                    log_probs[row].append(token.logprob or 0.0)
            yield [(row, token.id, token.mask) for row, token in step]

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        stopped: Callable[[], bool] = lambda: False,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Streams (token column, mask column) for the samples of one prompt.

        A sample that has ended repeats its last token with mask 0. `stopped()` ends it early."""
        chosen = sampling or _plain(max_tokens, temperature, top_k)
        column = [-1] * num_samples
        waiting: list[deque[Token]] = [deque() for _ in range(num_samples)]
        ended = [False] * num_samples

        def columns(all_of_it: bool) -> Iterator[tuple[list[int], list[int]]]:
            # A sample whose tool has spoken is ahead of the others, until they have caught up.
            while any(waiting) and (all_of_it or all(w or done for w, done in zip(waiting, ended))):
                mask = [0] * num_samples
                for i, queue in enumerate(waiting):
                    if queue:
                        token = queue.popleft()
                        column[i], mask[i] = token.id, token.mask
                        ended[i] = token.last
                yield list(column), mask

        for step in self._tokens([tokens], num_samples, chosen, seed, stopped):
            for row, token in step:
                waiting[row].append(token)
            yield from columns(all_of_it=False)
        yield from columns(all_of_it=True)

    def generate_batch(
        self,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 42,
        stopped: Callable[[], bool] = lambda: False,
        log_probs: list[list[float]] | None = None,
        sampling: Sampling | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks), one for each prompt and sample, prompt-major.

        `tokens` is one prompt or a list of prompts. A sequence begins with its prompt (mask 0) and
        includes the stop token if the model wrote one. `stopped()` ends all of them early. An empty
        list as `log_probs` is filled with one list for each sequence, aligned with it: 0 for the
        prompt and for forced tokens, the log-probability at temperature 1 of the others."""
        prompts: list[list[int]] = (
            [list(tokens)]  # type: ignore[arg-type]
            if tokens and isinstance(tokens[0], int)
            else [list(p) for p in tokens]  # type: ignore[arg-type]
        )
        sequences = [list(p) for p in prompts for _ in range(num_samples)]
        masks = [[0] * len(s) for s in sequences]
        if log_probs is not None:
            log_probs[:] = [[0.0] * len(s) for s in sequences]
        for events in self.stream(
            prompts,
            num_samples,
            max_tokens,
            temperature,
            top_k,
            seed,
            stopped,
            log_probs,
            sampling,
        ):
            for row, token, sampled in events:
                sequences[row].append(token)
                masks[row].append(sampled)
        return sequences, masks


def _plain(max_tokens: int, temperature: float, top_k: int | None) -> Sampling:
    """The settings that have flags of their own everywhere; below zero is as zero."""
    return Sampling(max_tokens, max(temperature, 0.0), max(top_k or 0, 0))
