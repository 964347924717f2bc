"""
The rows of a batch that are being decoded: their cache, their logits, their choice of a token.

This is the tensor side of nanochat/scheduler.py, which decides who joins and who leaves. Rows are
numbered without gaps: who joins comes last, and the last takes the place of one who leaves, so that
every pass is over rows that are all at work. Floor 2.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.kv_cache import KVCache, int64
from nanochat.sampling import Choice, Sampling, likeliest, log_probs_of
from nanochat.scheduler import Picked
from nanochat.static_step import Step

PREFILL_TOKENS = 16_384  # of one pass over new prompts, padding included


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been through the model: a row of a cache, and what comes next."""

    cache: KVCache
    row: int
    logits: Tensor  # (1, V)
    prompt: Sequence[int]


class Rows:
    """Rows of a model of ours in decoding. What scheduler.RowsLike says."""

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        room: int = 0,
        most: int = 0,
        step: Step | None = None,
    ) -> None:
        """`vocab_size`: the tokenizer's; a model may have more, which are never chosen. `room`
        and `most`: positions and rows that the cache has memory for from the start. `step`: how a
        token for each row is decoded, else by the model as it is."""
        self.model, self.vocab_size, self.step = model, vocab_size, step
        self.device = model.get_device()
        self.cache = KVCache(model.config.n_layer, 0, self.device, room, most)
        self.logits: Tensor | None = None  # (R, V): what each row's next token is chosen by
        self.samplings: list[Sampling] = []
        self._choice: Choice | None = None  # by the samplings; None: they have changed
        self._seen: Tensor | None = None  # (R, V): tokens of each row's text, if one is penalised

    # ---- passes

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Prefilled]:
        """Runs each prompt once, those of like length together."""
        handles: dict[int, Prefilled] = {}
        for batch in _like_lengths([len(p) for p in prompts]):
            chosen = [prompts[i] for i in batch]
            idx = torch.zeros(len(chosen), len(chosen[-1]), dtype=torch.int64)
            for row, prompt in zip(idx, chosen):
                row[: len(prompt)] = torch.tensor(prompt)
            cache = KVCache(self.model.config.n_layer, len(chosen), self.device)
            x = self.model.hidden(idx.to(self.device), cache)  # (P, T, D)
            cache.set_lengths([len(p) for p in chosen])
            ends = torch.tensor([len(p) - 1 for p in chosen], device=self.device)
            rows = torch.arange(len(chosen), device=self.device)
            logits = self._logits(x[rows, ends])  # (P, V)
            for row, i in enumerate(batch):
                handles[i] = Prefilled(cache, row, logits[row : row + 1], prompts[i])
        return [handles[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]]) -> None:
        """Goes on with each row's tokens: one in most, none where a row is to wait, several where a
        tool has spoken, which go through the model at once."""
        ends = [n + len(new) for n, new in zip(self.cache.lengths, tokens)]
        special: dict[int, Tensor] = {}
        for row, new in enumerate(tokens):
            if len(new) > 1:
                view = self.cache.row(row, len(new))
                idx = int64([new], self.device)
                special[row] = self._logits(self.model.hidden(idx, view)[:, -1])  # (1, V)
        self._remember(tokens)
        if len(special) < len(tokens):
            if special:  # such a row comes along; what is written behind its end is overwritten
                lengths = enumerate(self.cache.lengths)
                self.cache.set_lengths([ends[row] if row in special else n for row, n in lengths])
            # So does one that waits
            idx = int64([new if len(new) == 1 else [0] for new in tokens], self.device)
            self.logits = self._step(idx)
        elif self.logits is not None:
            self.logits = self.logits.clone()
        for row, logits in special.items():
            assert self.logits is not None
            self.logits[row] = logits[0]
        self.cache.set_lengths(ends)

    def _step(self, idx: Tensor) -> Tensor:
        """One token for every row: (R, 1) ids -> (R, V) logits."""
        if self.step is not None:
            return self._known(self.step(idx, self.cache))
        return self._logits(self.model.hidden(idx, self.cache)[:, -1])

    def _logits(self, x: Tensor) -> Tensor:
        return self._known(self.model.logits(x))

    def _known(self, logits: Tensor) -> Tensor:
        """Those of tokens that the tokenizer knows."""
        return logits if logits.size(1) == self.vocab_size else logits[:, : self.vocab_size]

    # ---- rows come and go

    @torch.inference_mode()
    def join(self, prefilled: Sequence[Prefilled], samplings: Sequence[Sampling]) -> None:
        """Copies of these prompts become rows, after those that are there."""
        start = 0
        while start < len(prefilled):  # stretches that come from the same pass
            source, end = prefilled[start].cache, start
            while end < len(prefilled) and prefilled[end].cache is source:
                end += 1
            self.cache.append(source, [p.row for p in prefilled[start:end]])
            start = end
        logits = [p.logits for p in prefilled]
        self.logits = torch.cat(logits if self.logits is None else [self.logits, *logits])
        penalised = any(s.repetition_penalty != 1 for s in samplings)
        if self._seen is not None or penalised:
            fresh = torch.zeros(len(prefilled), self.vocab_size, dtype=torch.bool)
            for row, p in zip(fresh, prefilled):
                row[torch.tensor(p.prompt)] = True
            if self._seen is None:  # no row before these asks for it
                self._seen = fresh.new_zeros(len(self.samplings), self.vocab_size).to(self.device)
            self._seen = torch.cat([self._seen, fresh.to(self.device)])
        self.samplings += samplings
        self._choice = None

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """The last row takes the place of this one."""
        self.cache.remove(row)
        last = len(self.samplings) - 1
        for tensor in (self.logits, self._seen):
            if tensor is not None and row != last:
                tensor[row] = tensor[last]
        if self.logits is not None:
            self.logits = self.logits[:last]
        if self._seen is not None:
            self._seen = self._seen[:last]
        self.samplings[row] = self.samplings[last]
        self.samplings.pop()
        self._choice = None

    def _remember(self, tokens: Sequence[Sequence[int]]) -> None:
        if self._seen is None:
            return
        if all(s.repetition_penalty == 1 for s in self.samplings):
            self._seen = None
            return
        pairs = [(row, token) for row, new in enumerate(tokens) for token in new]
        rows, ids = torch.tensor(pairs, device=self.device).unbind(1)
        self._seen[rows, ids] = True

    # ---- the choice

    @torch.inference_mode()
    def pick(self, uniforms: Sequence[float]) -> list[Picked]:
        """A token for each row, from its number in [0, 1). The only read from the device a step."""
        assert self.logits is not None
        if self._choice is None:
            self._choice = Choice(self.samplings, self.vocab_size, self.device)
        n = self._choice.alternatives
        if n is None:
            chosen = self._choice.on_host(self.logits, uniforms, self._seen)
            return [Picked(id, None, None) for id in chosen]
        tokens = self._choice(self.logits, uniforms, self._seen)  # (R,)
        values, ids = likeliest(self.logits, n)  # (R, n) each
        columns = [tokens[:, None], log_probs_of(self.logits, tokens)[:, None], values, ids]
        told = torch.cat([c.double() for c in columns], dim=1).tolist()  # one read for all of it
        picked = []
        for sampling, (token, logprob, *rest) in zip(self.samplings, told):
            wanted = sampling.logprobs
            if wanted is None:
                picked.append(Picked(int(token), None, None))
                continue
            top = list(zip(map(int, rest[n : n + wanted]), rest[:wanted]))
            picked.append(Picked(int(token), logprob, top))
        return picked


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches, each sorted by length: none more than twice as long as another (beyond a
    few tokens), since rows are padded to the longest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches:
            size, shortest = len(batches[-1]) + 1, lengths[batches[-1][0]]
            if lengths[i] <= 2 * shortest + 32 and size * lengths[i] <= PREFILL_TOKENS:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches
