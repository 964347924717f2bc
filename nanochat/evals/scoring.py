"""
The loss of given tokens, fast: many sequences in padded batches, and what the options of a question
have in common computed once.

    scores = score_groups(model, [[Probe(ids_of_choice_a, start), Probe(ids_of_choice_b, start)]])

The examples and the question before four choices are most of their tokens, so they go through the
model once and their keys and values serve all four. Floor 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nanochat.kv_cache import KVCache

MAX_BATCH_TOKENS = 8192  # of one forward pass, padding included
MAX_HEAD_TOKENS = 1024  # positions through the head at once: 256 MiB of float32 logits at 65,536
MIN_SHARED = 16  # tokens in common for which a second pass pays


class Probe(NamedTuple):
    """Tokens to run, and from which position on they are scored."""

    ids: list[int]
    start: int


class Score(NamedTuple):
    """Of one sequence's scored span."""

    loss: float  # mean over its tokens, nats
    greedy: bool  # whether every token is the likeliest one


def common_length(rows: Sequence[Sequence[int]], from_end: bool = False) -> int:
    """How many tokens all rows have in common at their beginning, or at their end."""
    if from_end:
        rows = [row[::-1] for row in rows]
    n = 0
    while all(n < len(row) and row[n] == rows[0][n] for row in rows):
        n += 1
    return n


def crop(sequence: Probe, limit: int) -> Probe:
    """The last `limit` tokens: what is asked stands at the end."""
    cut = max(0, len(sequence.ids) - limit)
    return Probe(sequence.ids[cut:], max(1, sequence.start - cut))


def token_batches(
    lengths: Sequence[int], counts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices in batches of like length, of at most MAX_BATCH_TOKENS with padding.

    Index i stands for counts[i] rows (default: one) of at most lengths[i] tokens."""
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the first is the longest
        count = counts[i] if counts is not None else 1
        if batch and (rows + count) * lengths[batch[0]] > MAX_BATCH_TOKENS:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += count
    if batch:
        yield batch


def shared_length(group: Sequence[Probe]) -> int:
    """Tokens at the beginning of all of a group's sequences that are run once, 0 if too few.

    The last token before a scored span is not among them: it predicts."""
    shared = min(common_length([p.ids for p in group]), min(p.start for p in group) - 1)
    return shared if len(group) > 1 and shared >= MIN_SHARED else 0


@torch.inference_mode()
def score_groups(model: Any, groups: Sequence[Sequence[Probe]]) -> list[list[Score]]:
    """The scores of groups of sequences, in the order given. Sequences of one group that begin
    alike share that beginning; the scores do not depend on it, up to rounding."""
    scores: list[list[Score]] = [[] for _ in groups]
    # An adapter of another library's model may have no cache that we could fill
    shared = [shared_length(g) if hasattr(model.config, "n_layer") else 0 for g in groups]
    alone = [i for i, n in enumerate(shared) if not n]
    flat = iter(score_sequences(model, [probe for i in alone for probe in groups[i]]))
    for i in alone:
        scores[i] = [next(flat) for _ in groups[i]]
    together = [i for i, n in enumerate(shared) if n]
    longest = [max(len(p.ids) for p in groups[i]) for i in together]
    for batch in token_batches(longest, [len(groups[i]) for i in together]):
        chosen = [together[j] for j in batch]
        found = iter(_score_shared(model, [groups[i] for i in chosen], [shared[i] for i in chosen]))
        for i in chosen:
            scores[i] = [next(found) for _ in groups[i]]
    return scores


def score_sequences(model: Any, sequences: Sequence[Probe]) -> list[Score]:
    """The scores of many sequences, run in padded batches, in the order given."""
    scores: dict[int, Score] = {}
    with torch.inference_mode():
        for batch in token_batches([len(s.ids) for s in sequences]):
            probes = [sequences[i] for i in batch]
            x = model.hidden(_padded([p.ids for p in probes], model.get_device()))  # (B, T, D)
            scores.update(zip(batch, _span_scores(model, x, probes)))
    return [scores[i] for i in range(len(sequences))]


def _score_shared(
    model: Any, groups: Sequence[Sequence[Probe]], shared: Sequence[int]
) -> list[Score]:
    """The scores of all sequences of the groups, which have shared[i] first tokens in common."""
    device = model.get_device()
    cache = KVCache(model.config.n_layer, len(groups), device)
    model.hidden(_padded([g[0].ids[:n] for g, n in zip(groups, shared)], device), cache)
    cache.set_lengths(shared)  # the padding behind shorter ones is forgotten
    cache.select([i for i, group in enumerate(groups) for _ in group])
    tails = [
        Probe(probe.ids[n:], probe.start - n) for group, n in zip(groups, shared) for probe in group
    ]
    x = model.hidden(_padded([tail.ids for tail in tails], device), cache)  # (B, T, D)
    return _span_scores(model, x, tails)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """(B, T) ids. Padding on the right: causal attention keeps it out of sight."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(idx, rows):
        row[: len(ids)] = torch.tensor(ids)
    return idx.to(device)


def _span_scores(model: Any, x: torch.Tensor, probes: Sequence[Probe]) -> list[Score]:
    """Scores of the probes' spans from the hidden states of their tokens: (B, T, D)."""
    spans = [len(p.ids) - p.start for p in probes]
    # What predicts token t stands at t - 1
    x = torch.cat([x[row, p.start - 1 : len(p.ids) - 1] for row, p in enumerate(probes)])
    # (N, D): only the positions that are scored go through the head
    targets = torch.tensor([t for p in probes for t in p.ids[p.start :]], device=x.device)  # (N,)
    losses, hits = [], []
    for part, wanted in zip(x.split(MAX_HEAD_TOKENS), targets.split(MAX_HEAD_TOKENS)):
        logits = model.logits(part).float()  # (n, V)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    pieces = zip(torch.cat(losses).cpu().split(spans), torch.cat(hits).cpu().split(spans))
    return [Score(float(loss.mean()), bool(hit.all())) for loss, hit in pieces]
