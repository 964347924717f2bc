"""
The slow twin of decoding with a cache: the whole text through the model for every token.

Helpers for the tests of every architecture and of every kind of layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.kv_cache import KVCache
from tests.models_for_tests import tokens_of


def assert_close(found: Tensor, wanted: Tensor, note: Any = None) -> None:
    """Equal but for the order in which float32 sums are taken, relative to the largest logit."""
    assert (found - wanted).abs().max() < 2e-5 * max(1.0, float(wanted.abs().max())), note


@torch.no_grad()
def assert_pieces_are_the_whole(model: Any, steps: Sequence[int]) -> KVCache:
    """The same text in pieces of any size, past growths of the cache, gives the logits that it
    gives at once. Returns the cache."""
    idx = tokens_of(model, 2, sum(steps))
    cache = KVCache(model.config.n_layer, batch=2)
    pieces = [model(piece, kv_cache=cache) for piece in idx.split(list(steps), dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(idx))
    assert cache.lengths == [sum(steps)] * 2
    return cache


@torch.no_grad()
def assert_rows_keep_to_themselves(
    model: Any, lengths: Sequence[int] = (1, 13, 60, 29), passes: int = 25
) -> None:
    """Each row says what it would say alone, whoever shares the batch: prompts are padded on the
    right, rows leave, are copied, join from another cache, and take each other's places."""
    T = 2  # tokens a pass
    texts = [tokens_of(model, 1, n + T * passes, seed=n) for n in lengths]
    naive = [model(text)[0] for text in texts]  # (n + T * passes, V)
    cache = KVCache(model.config.n_layer, batch=len(lengths))
    prompt = torch.full((len(lengths), max(lengths)), 95)  # padding, and also an ordinary token
    for row, text, n in zip(prompt, texts, lengths):
        row[:n] = text[0, :n]
    logits = model(prompt, kv_cache=cache)
    cache.set_lengths(lengths)
    for row, n in enumerate(lengths):
        assert_close(logits[row, :n], naive[row][:n], row)
    rows = list(range(len(lengths)))
    for step in range(passes):
        if step == passes // 3:
            rows = [3, 0, 3, 2]
            cache.select(rows)
        if step == passes // 2:
            other = KVCache(model.config.n_layer, batch=2)
            n = lengths[1] + T * step
            model(texts[1][:, :n].expand(2, -1), kv_cache=other)
            cache.append(other, [1])
            cache.remove(0)  # the new one takes its place
            rows = [1, *rows[1:]]
        at = [lengths[r] + T * step for r in rows]
        assert cache.lengths == at
        idx = torch.stack([texts[r][0, n : n + T] for r, n in zip(rows, at)])
        logits = model(idx, kv_cache=cache)
        for i, (r, n) in enumerate(zip(rows, at)):
            assert_close(logits[i], naive[r][n : n + T], (r, step))


@torch.no_grad()
def naive_greedy(
    model: Any, vocab_size: int, prompt: Sequence[int], max_tokens: int, stops: Collection[int] = ()
) -> list[int]:
    """No cache, no batch: prompt and reply, each token by the whole text before it."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :vocab_size].argmax()))
        if ids[-1] in stops:
            break
    return ids
