"""
Reinforcement learning's arithmetic: sampling replies, rewards to advantages, replies to batches.

On-policy policy gradient (REINFORCE, Williams 1992) with the group mean as baseline (as in GRPO,
arXiv 2402.03300, and by default without its division by the standard deviation: arXiv 2503.20783).
Every sampled token of a reply carries its reply's advantage. Groups without variance are left out,
and the loss is normalised by the number of sampled tokens in all others of the step (DAPO, arXiv
2503.14476). The loss itself: nanochat/policy.py.

The model that is trained samples the replies, between two steps: none is of older weights, unless
--inner_steps takes several steps on it. Ranks share out the problems, to the last one. Floor 4.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.common import seed_from
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.policy import PolicyBatch
from nanochat.reply import split_reply
from nanochat.rewards import Reward, checked


@dataclass
class Rollouts:
    """Sampled replies of one step on one rank, prompt-major, `num_samples` to a prompt."""

    sequences: list[list[int]]
    masks: list[list[int]]  # 1 = sampled by the model, the stop token included
    rewards: np.ndarray  # (prompts, samples)
    lengths: np.ndarray  # (prompts, samples): sampled tokens
    ended: np.ndarray  # (prompts, samples): whether the reply ended by itself
    log_probs: list[list[float]]  # the engine's, of each token; 0 where it did not choose

    @property
    def useful(self) -> np.ndarray:
        """(prompts,): which groups have variance, beyond what rounding makes; the others teach
        nothing."""
        size = np.abs(self.rewards).max(axis=1, initial=0.0)
        return self.rewards.max(axis=1) - self.rewards.min(axis=1) > 1e-6 * size

    def __add__(self, other: Rollouts) -> Rollouts:
        """These and then those of further problems."""
        return Rollouts(
            self.sequences + other.sequences,
            self.masks + other.masks,
            np.concatenate([self.rewards, other.rewards]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.ended, other.ended]),
            self.log_probs + other.log_probs,
        )


def problem_order(num_problems: int, seed: int, start: int, count: int) -> list[int]:
    """Problems start .. start + count of an endless sequence; each epoch is shuffled anew."""
    result = []
    for i in range(start, start + count):
        epoch, k = divmod(i, num_problems)
        rng = np.random.default_rng(seed_from(seed, "problems", epoch))
        result.append(int(rng.permutation(num_problems)[k]))
    return result


def spare_problems(num_problems: int, seed: int, used: Sequence[int], count: int) -> list[int]:
    """Up to `count` further problems for a step that has `used` those; shuffled by the seed."""
    order = np.random.default_rng(seed_from(seed, "spare")).permutation(num_problems)
    taken = set(used)
    return [int(p) for p in order if int(p) not in taken][:count]


def sample_rollouts(
    engine: Engine,
    task: Any,
    problems: Sequence[int],
    *,
    reward: Reward,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Rollouts:
    """Samples replies to the problems, which may be none, in one batch, and rewards them.

    A problem's replies depend on (seed, problem), not on which rank it falls to. When `stopped()`
    turns true they are broken off, and no good for training. UserError for a reward that is not a
    finite number."""
    shape = (len(problems), num_samples)
    if not problems:  # more ranks than problems
        nothing = np.zeros(shape)
        return Rollouts([], [], nothing, nothing.astype(int), nothing.astype(bool), [])
    conversations = [task[p] for p in problems]
    log_probs: list[list[float]] = []
    prompts = [engine.tokenizer.render_for_completion(c) for c in conversations]
    sequences, masks = engine.generate_batch(
        prompts,
        num_samples=num_samples,
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=[seed_from(seed, p) for p in problems],
        stopped=stopped,
        log_probs=log_probs,
    )
    rewards = np.zeros(len(sequences))
    for i, sequence in enumerate(sequences):
        conversation = conversations[i // num_samples]
        start = len(prompts[i // num_samples])
        reply, _ = split_reply(engine.tokenizer, sequence[start:], masks[i][start:])
        value = reward(conversation, reply)
        rewards[i] = checked(value, problems[i // num_samples], conversation, reply)
    stops = engine.tokenizer.stop_token_ids
    return Rollouts(
        sequences,
        masks,
        rewards.reshape(shape),
        np.array([sum(m) for m in masks]).reshape(shape),
        np.array([s[-1] in stops and m[-1] == 1 for s, m in zip(sequences, masks)]).reshape(shape),
        log_probs,
    )


def advantages(rewards: np.ndarray, by_std: bool = False) -> np.ndarray:
    """Reward minus the mean of its group: (prompts, samples) -> same.

    `by_std`: also divided by the group's standard deviation (n - 1 in the denominator, as in TRL);
    nothing is added to it, since groups without variance are not trained on."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if not by_std:
        return centred
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    return np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)


def to_batches(
    rollouts: Rollouts,
    device_batch_size: int,
    pad_id: int,
    device: torch.device,
    by_std: bool = False,
    max_tokens: int | None = None,
) -> list[PolicyBatch]:
    """Micro-batches of the replies whose group has variance; the others teach nothing.

    Loss is on sampled tokens only, the stop token included: without it ending would never be
    reinforced. Replies of similar length share a micro-batch, the longest come first: memory that
    does not suffice shows at once. A micro-batch has `device_batch_size` replies; or with
    `max_tokens` as many as have no more tokens than that, padding included, and one at least. The
    last one may be smaller, and no reply is left out."""
    weights = advantages(rollouts.rewards, by_std)
    useful = np.repeat(rollouts.useful, weights.shape[1])
    rows: list[int] = np.flatnonzero(useful).tolist()
    rows.sort(key=lambda i: len(rollouts.sequences[i]))
    batches = []
    while rows:
        T = len(rollouts.sequences[rows[-1]]) - 1
        size = max(1, max_tokens // T) if max_tokens else device_batch_size
        rows, chunk = rows[:-size], rows[-size:]
        idx = torch.full((len(chunk), T), pad_id, dtype=torch.int64)
        targets = torch.full((len(chunk), T), IGNORE, dtype=torch.int64)
        sampled_log_probs = torch.zeros(len(chunk), T)
        for row, i in enumerate(chunk):
            ids = torch.tensor(rollouts.sequences[i])
            sampled = torch.tensor(rollouts.masks[i][1:], dtype=torch.bool)
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(sampled, ids[1:], IGNORE)
            sampled_log_probs[row, : len(ids) - 1] = torch.tensor(rollouts.log_probs[i][1:])
        scale = torch.tensor([weights.flat[i] for i in chunk], dtype=torch.float32)  # (B,)
        batches.append(
            PolicyBatch(
                idx.to(device),
                targets.to(device),
                advantages=scale[:, None].to(device),
                sampled=sampled_log_probs.to(device),
            )
        )
    return batches
