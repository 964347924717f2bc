"""
Direct preference optimization: which of two replies people like better, learned without a reward
model (Rafailov et al. 2023, arXiv 2305.18290).

    loss of a pair = -log sigmoid(beta * (gain(chosen) - gain(rejected)))
    gain(reply)    = log p(reply | prompt) - the same of the starting model, the reference

A reply's log-probability is the sum over its tokens, the one that ends the turn included; what a
tool printed is not the model's. The reference's are computed once, before the first step, and kept:
there is no second model. The loss is the mean over the pairs of a step, on all ranks. With label
smoothing e a pair counts as the other way round with probability e (Mitchell, cDPO).

Here are pairs, batches and the loss; scripts/chat_dpo.py runs them. Floor 4.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import dataset
from nanochat.common import UserError, fingerprint, print0
from nanochat.conversation import Conversation, check_conversation
from nanochat.dataloader import IGNORE, MicroBatch
from nanochat.distributed import DistInfo, all_reduce_sum
from nanochat.preview import mark
from nanochat.tasks.common import Rows, read_rows

Reply = tuple[list[int], list[int]]  # prompt and reply as tokens; 1 where the reply is learned from
EXAMPLE = '{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}'


# -------------------------------------------------------------------------------------------------
# Pairs


def read_pair(row: dict[str, Any], where: str) -> tuple[Conversation, Conversation]:
    """The row's chosen and rejected conversation.

    "prompt" is what the user says, or a list of messages that the user ends; "chosen" and
    "rejected" are what the assistant replies: text, or messages that end with the assistant's (the
    whole conversation, or its last message). Raises UserError naming `where`."""
    prompt = row.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or any(not row.get(name) for name in ("chosen", "rejected")):
        found = ", ".join(name for name, value in row.items() if value) or "nothing"
        raise UserError(f"{where}: expected a pair as {EXAMPLE}, found {found}")
    check_conversation({"messages": messages}, f'{where}: "prompt"')
    if messages[-1]["role"] != "user":
        raise UserError(f'{where}: "prompt" must end with the user, who is replied to')

    def conversation(name: str) -> Conversation:
        said = row[name]
        replies = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        if not isinstance(replies, list):
            raise UserError(f'{where}: "{name}" must be text or a list of messages')
        before = replies[:-1]
        if before and before != list(messages):
            raise UserError(
                f'{where}: what stands before the last message of "{name}" is not the prompt; the '
                "two conversations of a pair may differ in their last reply only"
            )
        whole = {"messages": [*messages, *replies[-1:]]}
        if row.get("tools"):
            whole["tools"] = row["tools"]
        check_conversation(whole, f'{where}: "{name}"')
        if whole["messages"][-1]["role"] != "assistant":
            raise UserError(f'{where}: "{name}" must end with the assistant')
        return whole

    return conversation("chosen"), conversation("rejected")


def encode_reply(tokenizer: Any, conversation: Conversation) -> Reply:
    """Tokens of a conversation, and which of them are of its last reply, the end token included:
    earlier replies are part of the prompt."""
    ids, mask = tokenizer.render_conversation(conversation)
    trained = tokenizer.trained_mask(ids, mask)
    start = len(tokenizer.render_for_completion(conversation))
    return ids, [0] * start + trained[start:]


@dataclass
class Pairs:
    """Pairs as tokens, and how many of the rows they came from were left out, and why."""

    replies: list[tuple[Reply, Reply]]  # (chosen, rejected)
    too_long: int = 0
    alike: int = 0

    def __len__(self) -> int:
        return len(self.replies)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its reply."""
        return max(self.length(i) for i in range(len(self)))

    def length(self, i: int) -> int:
        """Tokens of the longer reply of a pair, prompt included."""
        return max(len(ids) for ids, _ in self.replies[i])

    @property
    def fingerprint(self) -> str:
        return fingerprint(*(json.dumps(pair) for pair in self.replies))

    def account(self) -> str:
        """How many pairs were kept and dropped, and why, in a sentence."""
        said = f"pairs: {len(self):,} kept, {self.too_long + self.alike:,} dropped"
        if not self.too_long + self.alike:
            return said
        return (
            f"{said} ({self.too_long:,}: longer than --max_seq_len; {self.alike:,}: both replies "
            "are the same tokens)"
        )


def encode_pairs(rows: Rows, chosen: Sequence[int], tokenizer: Any, max_tokens: int) -> Pairs:
    """The rows of these numbers as tokens. A pair with more than `max_tokens` in one of its replies
    is left out: cut, it would be another preference."""
    pairs = Pairs([])
    for i in chosen:
        both = [encode_reply(tokenizer, c) for c in read_pair(rows[i], rows.where(i))]
        if max(len(ids) for ids, _ in both) > max_tokens:
            pairs.too_long += 1
        elif both[0] == both[1]:
            pairs.alike += 1
        else:
            pairs.replies.append((both[0], both[1]))
    return pairs


def load_pairs(
    data: str, val_data: str | None, tokenizer: Any, max_tokens: int
) -> tuple[Pairs, Pairs | None, str]:
    """(pairs to train on, those held out or None, in words which these are), of a file, folder or
    glob of parquet or jsonl; split as --data of other stages is, of a lone file by a hash of the
    prompt."""
    files = dataset.split_files(data, val_data, dataset.ROW_SUFFIXES)
    sides = []
    for paths, keep in ((files.train, files.keep_train), ([files.val], files.keep_val)):
        rows = read_rows(paths)
        numbers = [i for i in range(len(rows)) if keep == "all" or _side(rows[i]) == keep]
        sides.append(encode_pairs(rows, numbers, tokenizer, max_tokens))
    train, val = sides
    if not len(train):
        raise UserError(
            f"--data={data} leaves nothing to train on: {train.account()}. Add pairs, raise "
            "--max_seq_len, or name another file for validation by --val_data"
        )
    return train, val if len(val) else None, files.validation


def _side(row: dict[str, Any]) -> dataset.Keep:
    """Decided by the prompt alone: none is on both sides."""
    text = json.dumps(row.get("prompt"), sort_keys=True, ensure_ascii=False, default=str)
    return "val" if dataset.is_val_document(text) else "train"


# -------------------------------------------------------------------------------------------------
# Batches


@dataclass(kw_only=True)
class PairBatch(MicroBatch):
    """P pairs as 2 P rows: the chosen replies, then the rejected ones in the same order."""

    reference: Tensor  # (2 P,) float32: log-probabilities of the replies under the starting model
    beta: float = 0.1
    label_smoothing: float = 0.0
    seen: Tensor | None = field(default=None, init=False)
    """(4,) sums over the pairs, set by loss(): right ones, margins, rewards of both sides."""

    def count(self) -> Tensor:
        """(): pairs."""
        return torch.tensor(self.idx.size(0) // 2, device=self.idx.device)

    def log_probs(self, forward: Callable[..., Tensor]) -> Tensor:
        """(2 P,): log-probability of each reply."""
        return -forward(self.idx, self.targets, reduction="none").sum(1)

    def loss(self, forward: Callable[..., Tensor]) -> Tensor:
        """Summed over the pairs; see the module docstring. Rewards are the gains times beta."""
        rewards = self.beta * (self.log_probs(forward) - self.reference)  # (2 P,)
        chosen, rejected = rewards.chunk(2)
        margin = chosen - rejected  # (P,)
        right = (margin > 0).to(margin.dtype)
        self.seen = torch.stack([right, margin, chosen, rejected]).detach().sum(1)
        e = self.label_smoothing
        return -((1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)).sum()


def make_batch(
    pairs: Pairs,
    numbers: Sequence[int],
    reference: Tensor,
    pad_id: int,
    device: torch.device,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairBatch:
    """These pairs in one micro-batch, padded at the end. `reference`: (pairs, 2), of all."""
    rows = [pairs.replies[i][side] for side in (0, 1) for i in numbers]
    T = max(len(ids) for ids, _ in rows) - 1
    idx = torch.full((len(rows), T), pad_id, dtype=torch.int64)
    targets = torch.full((len(rows), T), IGNORE, dtype=torch.int64)
    for row, (ids, trained) in enumerate(rows):
        tokens = torch.tensor(ids)
        learned = torch.tensor(trained[1:], dtype=torch.bool)
        idx[row, : len(ids) - 1] = tokens[:-1]
        targets[row, : len(ids) - 1] = torch.where(learned, tokens[1:], IGNORE)
    return PairBatch(
        idx.to(device),
        targets.to(device),
        reference=reference[list(numbers)].T.reshape(-1).to(device),
        beta=beta,
        label_smoothing=label_smoothing,
    )


def by_length(pairs: Pairs, numbers: Sequence[int], size: int) -> list[list[int]]:
    """The numbers in groups of `size` pairs of similar length; the last may be smaller."""
    ordered = sorted(numbers, key=lambda i: (pairs.length(i), i))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


@torch.no_grad()
def reference_log_probs(
    model: Any, pairs: Pairs, size: int, pad_id: int, info: DistInfo, autocast: Callable[[], Any]
) -> Tensor:
    """(pairs, 2) float32 on the host: log-probability of every chosen and rejected reply under the
    model as it is now. Shared out over the ranks, which must all call it; which pairs go together
    does not depend on their number."""
    result = torch.zeros(len(pairs), 2)
    for numbers in by_length(pairs, range(len(pairs)), size)[info.rank :: info.world_size]:
        batch = make_batch(pairs, numbers, result, pad_id, info.device)
        with autocast():
            result[numbers] = batch.log_probs(model).view(2, -1).T.float().cpu()
    return all_reduce_sum(result.to(info.device)).cpu()


@torch.no_grad()
def evaluate_pairs(
    forward: Callable[..., Tensor], batches: Iterator[PairBatch], info: DistInfo
) -> dict[str, float]:
    """Mean loss, accuracy (share of pairs whose chosen reply gained more) and margin of the rewards
    over the batches of all ranks, which must all call it."""
    sums = torch.zeros(6, device=info.device)
    for batch in batches:
        loss = batch.loss(forward)
        assert batch.seen is not None
        sums += torch.cat([batch.count()[None], loss[None], batch.seen])
    return _means(all_reduce_sum(sums), "loss")


def seen_by(batches: Sequence[PairBatch], info: DistInfo) -> dict[str, float]:
    """Accuracy, margin and rewards that the last passes over a step's batches saw, on all ranks,
    which must all call it."""
    sums = torch.zeros(6, device=info.device)
    for batch in batches:
        assert batch.seen is not None
        sums += torch.cat([batch.count()[None], sums.new_zeros(1), batch.seen])
    return _means(all_reduce_sum(sums))


def _means(sums: Tensor, *more: str) -> dict[str, float]:
    count, loss, right, margin, chosen, rejected = sums.tolist()
    values = {
        "loss": loss, "accuracy": right, "margin": margin,
        "chosen_reward": chosen, "rejected_reward": rejected,
    }  # fmt: skip
    return {k: v / max(1, count) for k, v in values.items() if k != "loss" or k in more}


def preview_pairs(pairs: Pairs, val: Pairs | None, tokenizer: Any, validation: str) -> None:
    """Prints the account of the pairs, and the first few with what is learned from marked."""
    held_out = f"{len(val):,} held out ({validation})" if val else "none held out"
    print0(f"{pairs.account()}; {held_out}; at most {pairs.longest:,} tokens")
    for i in range(min(3, len(pairs))):
        for name, (ids, trained) in zip(("chosen", "rejected"), pairs.replies[i]):
            print0(f"\n--- pair {i}, {name}: {len(ids):,} tokens")
            print0(mark(tokenizer, ids, [bool(t) for t in trained]))
