"""
Inference: a key/value cache, sampling, and tool use.

    engine = Engine(model, tokenizer)
    for column, mask in engine.generate(tokens, max_tokens=64): ...
    sequences, masks = engine.generate_batch([tokens_a, tokens_b], num_samples=4)

Prompts of any lengths share a batch: rows are padded on the right, each has its own length, and
causality hides the padding until it is overwritten. Rows that are finished leave the batch.
Floor 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError, seed_from
from nanochat.execution import calculate


class KVCache:
    """Keys and values of every layer for a batch of rows, each with its own length.

    Tensors are (B, K, S, E) in the dtype the model computes in; S grows by allocation and copy.
    Models that ask for previous() have their tokens held too."""

    def __init__(self, n_layer: int, batch: int, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.lengths = [0] * batch  # tokens held by each row; on the host, so no sync is needed
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        # (B, 1 + S): -1, which stands before every row, then the row's tokens.
        self.ids: Tensor | None = None
        self._masks: dict[tuple[int, int | None], Tensor] = {}  # of the pass under way

    def positions(self, T: int) -> Tensor:
        """(B, T): where the next T tokens of each row stand."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return lengths[:, None] + torch.arange(T, device=self.device)

    def end(self, T: int) -> int:
        """One more than the last of these positions in any row."""
        return max(self.lengths) + T

    def mask(self, T: int, window: int | None = None) -> Tensor | None:
        """(B, 1, T, S): True where a new token may look: `window` positions back, its own included
        (None: all the way). None: all rows are empty and no window is exceeded, plain causal."""
        if max(self.lengths) == 0 and (window is None or window >= T):
            return None
        if (T, window) not in self._masks:
            keys = torch.arange(self.end(T), device=self.device)  # (S,)
            at = self.positions(T)[:, :, None]  # (B, T, 1)
            visible = keys <= at  # (B, T, S)
            if window is not None:
                visible = visible & (keys > at - window)
            self._masks[T, window] = visible[:, None]
        return self._masks[T, window]

    def previous(self, idx: Tensor) -> Tensor:
        """(B, T) ids of the pass under way -> (B, T) ids of the tokens before them in their rows,
        -1 before a row's first. For models that mix a token with the one before.

        Such a model must ask in every pass, or the tokens of the others are unknown: ValueError if
        the cache was filled without being asked."""
        B, T = idx.shape
        end = self.end(T)
        if self.ids is None and end > T:
            raise ValueError("previous() of a cache that was filled without being asked for it")
        if self.ids is None or self.ids.size(1) < 1 + end:
            fresh = idx.new_full((B, 1 + self._size(end)), -1)
            if self.ids is not None:
                fresh[:, : self.ids.size(1)] = self.ids
            self.ids = fresh
        rows, at = torch.arange(B, device=idx.device)[:, None], self.positions(T)
        self.ids[rows, at + 1] = idx
        return self.ids[rows, at]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, E) keys and values; returns all of them, (B, K, S, E)."""
        T = k.size(2)
        end = self.end(T)
        held = self.layers[layer]
        if held is None or held[0].size(2) < end:
            held = self.layers[layer] = self._grown(held, k, end)
        for cache, new in zip(held, (k, v)):
            if min(self.lengths) == max(self.lengths):
                cache[:, :, end - T : end] = new
            else:
                rows = torch.arange(len(self.lengths), device=k.device)[:, None]  # (B, 1)
                cache.transpose(1, 2)[rows, self.positions(T)] = new.transpose(1, 2)
        return held[0][:, :, :end], held[1][:, :, :end]

    @staticmethod
    def _size(end: int) -> int:
        """Room for `end` positions and half as many again, in chunks of 64."""
        return -(-(end * 3 // 2) // 64) * 64

    @classmethod
    def _grown(
        cls, held: tuple[Tensor, Tensor] | None, like: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        B, K, _, E = like.shape
        size = cls._size(end)
        fresh = (like.new_zeros(B, K, size, E), like.new_zeros(B, K, size, E))
        if held is not None:
            for old, new in zip(held, fresh):
                new[:, :, : old.size(2)] = old
        return fresh

    def advance(self, T: int) -> None:
        """The T tokens of the pass that has ended now count as held."""
        self.lengths = [n + T for n in self.lengths]
        self._masks = {}

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Shortens rows to their true lengths after a padded prompt."""
        self.lengths, self._masks = list(lengths), {}

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may be named more than once."""
        self.lengths, self._masks = [self.lengths[r] for r in rows], {}
        index = torch.tensor(rows, device=self.device)
        self.layers = [
            None if kv is None else (kv[0].index_select(0, index), kv[1].index_select(0, index))
            for kv in self.layers
        ]
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, uniforms: Sequence[float]
) -> list[int]:
    """One token for each row of (R, V) logits; uniforms are R numbers in [0, 1).

    Temperature 0 takes the most likely. The choice inverts the cumulative distribution, so a row's
    token depends on its own number only and not on who shares the batch."""
    if temperature <= 0:
        return logits.argmax(-1).tolist()
    logits, ids = logits.float() / temperature, None
    if top_k is not None and 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)  # (R, k): from here on nothing else exists
    cdf = logits.softmax(-1).cumsum(-1)  # (R, V or k)
    # float32 rounds a number close to 1 up to 1, which would point past the last token.
    u = torch.tensor(uniforms, dtype=cdf.dtype, device=cdf.device).clamp(max=1 - 2**-24)
    # right=True finds the first entry above u: never a token of probability zero.
    chosen = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # (R, 1)
    chosen = chosen.clamp(max=cdf.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0].tolist()


def log_probs_of(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-probability of one token for each row of (R, V) logits, at temperature 1 and among
    all V: what a model that is trained on the token is told, whatever it was sampled with."""
    logits = logits.float()
    ids = torch.tensor(tokens, device=logits.device)
    return (logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)).tolist()


class ToolUse:
    """The calculator, as a state machine over a row's tokens.

    Between the start and the end of a call the expression is collected; then its result, written
    as the tokenizer's chat format writes tool output, is what the row must say next. (In ChatML
    that is the end of the turn, the user's answer, and the opening of the next turn.)"""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.tool_call_ids
        self.collecting: list[int] | None = None

    def feed(self, token: int) -> list[int]:
        """Takes the row's next token; returns the tokens to force after it."""
        if token == self.start:
            self.collecting = []
        elif token == self.end and self.collecting is not None:
            written, self.collecting = self.tokenizer.decode(self.collecting), None
            result = calculate(self.tokenizer.read_tool_call(written))
            if result is not None:
                return self.tokenizer.tool_output_ids(result)
        elif self.collecting is not None:
            self.collecting.append(token)
        return []


@dataclass
class Row:
    """One reply under way."""

    index: int
    random: np.random.Generator
    tool: ToolUse | None
    forced: deque[int] = field(default_factory=deque)
    length: int = 0
    last: int = -1
    stopped: bool = False  # the model wrote a stop token; a forced one ends nothing
    done: bool = False


class Engine:
    """Generates with a model of ours. Inference mode, the raw (uncompiled) module."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = tokenizer.get_vocab_size()  # the model may have more rows; never sampled
        self.stops: set[int] = set(tokenizer.stop_token_ids)
        try:
            self.has_tools = len(tokenizer.tool_call_ids) > 0
        except UserError:  # a vocabulary without tokens for calls
            self.has_tools = False

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> tuple[KVCache, Tensor]:
        """Runs each prompt once, then copies its row: a cache of R = P * copies rows, (R, V)."""
        if not prompts or not all(prompts):
            raise UserError("a prompt must have at least one token")
        device = self.model.get_device()
        longest = max(map(len, prompts))
        idx = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in zip(idx, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        cache = KVCache(self.model.config.n_layer, len(prompts), device)
        x = self.model.hidden(idx.to(device), cache)  # (P, T, D)
        cache.set_lengths([len(p) for p in prompts])
        ends = torch.tensor([len(p) - 1 for p in prompts], device=device)
        logits = self.model.logits(x[torch.arange(len(prompts), device=device), ends])  # (P, V)
        if copies > 1:
            rows = [p for p in range(len(prompts)) for _ in range(copies)]
            cache.select(rows)
            logits = logits[torch.tensor(rows, device=device)]
        return cache, logits

    @torch.inference_mode()
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
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yields, step by step, (row, token, mask) for the rows still going.

        Rows are prompt-major: row = prompt * num_samples + sample. mask is 1 for a sampled token, 0
        for a forced one (tool output). A row ends after a stop token or max_tokens tokens. `seed`
        may be one for each prompt. `log_probs`, a list for each row, is added to: log_probs_of each
        token, 0 for a forced one."""
        if max_tokens < 1 or num_samples < 1:
            return
        seeds = [
            seed_from(seed, p) if isinstance(seed, int) else seed[p] for p in range(len(prompts))
        ]
        cache, logits = self._prefill(prompts, num_samples)
        rows = [
            Row(
                p * num_samples + s,
                np.random.default_rng(seed_from(seeds[p], s)),
                ToolUse(self.tokenizer) if self.has_tools else None,
            )
            for p in range(len(prompts))
            for s in range(num_samples)
        ]
        while not stopped():
            uniforms = [row.random.random() for row in rows]
            logits = logits[:, : self.vocab_size]
            sampled = sample(logits, temperature, top_k, uniforms)
            if log_probs is not None:
                for row, value in zip(rows, log_probs_of(logits, sampled)):
                    if not row.done:
                        log_probs[row.index].append(0.0 if row.forced else value)
            yield [self._take(row, token) for row, token in zip(rows, sampled) if not row.done]
            going = []
            for i, row in enumerate(rows):
                row.done = row.done or row.length >= max_tokens or row.stopped
                if not row.done:
                    going.append(i)
            if not going:
                return
            # Leaving copies the cache: worth it once a quarter of the rows are idle.
            if len(going) <= 0.75 * len(rows):
                cache.select(going)
                rows = [rows[i] for i in going]
            idx = torch.tensor([[row.last] for row in rows], device=self.model.get_device())
            logits = self.model.logits(self.model.hidden(idx, cache)[:, -1])  # (R, V)

    def _take(self, row: Row, sampled: int) -> tuple[int, int, int]:
        """The row's next token: a forced one if there is one waiting, else what was sampled."""
        mask = 0 if row.forced else 1
        row.last = row.forced.popleft() if row.forced else sampled
        row.length += 1
        row.stopped = mask == 1 and row.last in self.stops
        if row.tool is not None:
            row.forced.extend(row.tool.feed(row.last))
        return row.index, row.last, mask

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Streams (token column, mask column) for the samples of one prompt.

        A sample that has ended repeats its last token with mask 0. `stopped()` ends it early."""
        column, mask = [-1] * num_samples, [0] * num_samples
        for events in self.stream(
            [tokens], num_samples, max_tokens, temperature, top_k, seed, stopped
        ):
            mask = [0] * num_samples
            for row, token, sampled in events:
                column[row], mask[row] = token, sampled
            yield list(column), mask

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
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks), one for each prompt and sample, prompt-major.

        `tokens` is one prompt or a list of prompts. A sequence begins with its prompt (mask 0) and
        includes the stop token if the model wrote one. `stopped()` ends all of them early. An empty
        list as `log_probs` is filled with one list for each sequence, aligned with it: 0 for the
        prompt and for forced tokens, log_probs_of the others."""
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
            prompts, num_samples, max_tokens, temperature, top_k, seed, stopped, log_probs
        ):
            for row, token, sampled in events:
                sequences[row].append(token)
                masks[row].append(sampled)
        return sequences, masks
