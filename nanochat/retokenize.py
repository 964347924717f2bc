"""
A trained model with another tokenizer: which of its embedding rows the new tokens begin with.

Only the tables that have a row for each token depend on the tokenizer: the embedding and the head.
A token that both vocabularies have (by its bytes) keeps its row; another one begins with the mean
of the rows of its pieces, the tokens that the old tokenizer cuts its bytes into; a special token
begins with the row of the one that did its work. All the rest of the model stays as it is, so that
training (python -m scripts.base_train --source_tag=TAG --tokenizer=... --retrain_embeddings) has
less to learn than a new model, and more than one whose tokenizer was left alone.
Floor 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.distributed import local, local_rows
from nanochat.tokenizer import Tokenizer

# What a special token of another format does, in words of ours, the main thing first. A token with
# a name of ours does that.
WORK = {
    "<|endoftext|>": ("<|bos|>",),
    "<|begin_of_text|>": ("<|bos|>",),
    "<s>": ("<|bos|>",),
    "<|im_start|>": ("<|assistant_start|>", "<|user_start|>"),
    "<|im_end|>": ("<|assistant_end|>", "<|user_end|>"),
    "<tool_call>": ("<|python_start|>",),
    "</tool_call>": ("<|python_end|>",),
}


@dataclass(frozen=True)
class RowPlan:
    """For each new id, the old ids whose rows it begins with the mean of.

    Those of new id i are pieces[offsets[i] : offsets[i + 1]]; none: the mean of all old rows."""

    pieces: np.ndarray  # int64
    offsets: np.ndarray  # (new vocabulary + 1,) int64
    num_shared: int
    """Tokens with the same bytes in both."""
    num_mixed: int
    """Tokens that begin with the mean of their pieces."""
    num_by_work: int
    """Special tokens that another one with the same work begins."""
    num_old: int
    """Size of the old vocabulary; rows past it were never trained."""

    def rows(self, table: Tensor, count: int) -> Tensor:
        """(V_old, D) -> (count, D): the new table. Rows that no id has (padding) are the mean of
        all old ones, which makes them as likely as a token about which nothing is known."""
        table = table[: self.num_old]
        new = table.mean(0, keepdim=True).repeat(count, 1)
        size = len(self.offsets) - 1
        pieces, offsets = torch.from_numpy(self.pieces), torch.from_numpy(self.offsets)
        means = F.embedding_bag(pieces, table, offsets, mode="mean", include_last_offset=True)
        has_pieces = offsets.diff() > 0
        new[:size][has_pieces] = means[has_pieces]
        return new


def plan_rows(old: Tokenizer, new: Tokenizer) -> RowPlan:
    """Compares two vocabularies: a second or two for 151,000 tokens."""
    pieces: list[list[int]] = [[] for _ in range(new.get_vocab_size())]
    ranks = old.vocabulary.ranks
    num_shared = num_by_work = 0
    for token, id in new.vocabulary.ranks.items():
        num_shared += token in ranks
        pieces[id] = [ranks[token]] if token in ranks else old.encode_bytes(token)
    for name, id in new.vocabulary.specials.items():
        twin = _same_work(name, old)
        num_by_work += twin is not None
        # Of a special token that has no counterpart we know its name, and that is not nothing
        pieces[id] = old.encode_bytes(name.encode()) if twin is None else [twin]
    num_mixed = len(new.vocabulary.ranks) + len(new.vocabulary.specials) - num_shared - num_by_work
    return RowPlan(
        np.array([piece for row in pieces for piece in row], dtype=np.int64),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        num_shared,
        num_mixed,
        num_by_work,
        old.get_vocab_size(),
    )


def _same_work(name: str, old: Tokenizer) -> int | None:
    """The old special token that did what the new one is to do: the same one, or by WORK."""
    specials = old.vocabulary.specials
    if name in specials:
        return specials[name]
    for work in WORK.get(name, (name,)):
        for other, id in specials.items():
            if work in WORK.get(other, (other,)):
                return id
    return None


@torch.no_grad()
def retrain_embeddings(source: Any, old: Tokenizer, target: Any, new: Tokenizer) -> str:
    """Fills `target` with the weights of `source`, its tables with rows for the new tokenizer's
    tokens. The configs differ in vocab_size (and sequence_len) only. Returns what was done, in
    words. UserError if the target has fewer rows than the new tokenizer ids."""
    count = target.config.vocab_size
    if count < new.get_vocab_size():
        raise UserError(f"the model has {count} rows, the tokenizer {new.get_vocab_size()} ids")
    plan = plan_rows(old, new)
    groups = target.param_groups()
    kinds = ("embedding", "value_embedding", "head")
    tables = {id(p) for kind in kinds for p in groups.get(kind, [])}  # one if they are tied
    for name, p in target.named_parameters():
        weights = source.get_parameter(name).to("cpu")
        whole = plan.rows(weights, count) if id(p) in tables else weights
        local(p).copy_(whole[slice(*local_rows(p))])
    padding = count - plan.num_shared - plan.num_mixed - plan.num_by_work
    return (
        f"embeddings for another tokenizer: of {count:,} rows {plan.num_shared:,} are carried over "
        f"(the same bytes), {plan.num_by_work:,} are those of special tokens with the same work, "
        f"{plan.num_mixed:,} begin with the mean of their pieces' rows"
        + (f", {padding:,} belong to no token" if padding else "")
    )
