"""
Reinforcement learning's arithmetic: sampling replies, rewards to advantages, replies to batches.

On-policy policy gradient (REINFORCE, Williams 1992) with the group mean as baseline (as in GRPO,
arXiv 2402.03300, without the division by the standard deviation: arXiv 2503.20783). Every sampled
token of a reply carries its reply's advantage. Groups without variance are left out, and the loss
is normalised by the number of sampled tokens in all others of the step (DAPO, arXiv 2503.14476).
Floor 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError, seed_from
from nanochat.dataloader import IGNORE, MicroBatch
from nanochat.engine import Engine
from nanochat.evals.chat import split_reply


@dataclass
class Rollouts:
    """Sampled replies of one step on one rank, prompt-major, `num_samples` to a prompt."""

    sequences: list[list[int]]
    masks: list[list[int]]  # 1 = sampled by the model, the stop token included
    rewards: np.ndarray  # (prompts, samples)
    lengths: np.ndarray  # (prompts, samples): sampled tokens
    ended: np.ndarray  # (prompts, samples): whether the reply ended by itself


def problem_order(num_problems: int, seed: int, start: int, count: int) -> list[int]:
    """Problems start .. start + count of an endless sequence; each epoch is shuffled anew."""
    result = []
    for i in range(start, start + count):
        epoch, k = divmod(i, num_problems)
        rng = np.random.default_rng(seed_from(seed, "problems", epoch))
        result.append(int(rng.permutation(num_problems)[k]))
    return result


def sample_rollouts(
    engine: Engine,
    task: Any,
    problems: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Rollouts:
    """Samples replies to the problems and has the task reward them.

    A problem's replies depend on (seed, problem), not on which rank it falls to. When `stopped()`
    turns true they are broken off, and no good for training."""
    conversations = [task[p] for p in problems]
    prompts = [engine.tokenizer.render_for_completion(c) for c in conversations]
    sequences, masks = engine.generate_batch(
        prompts,
        num_samples=num_samples,
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=[seed_from(seed, p) for p in problems],
        stopped=stopped,
    )
    rewards = np.zeros(len(sequences))
    for i, sequence in enumerate(sequences):
        conversation = conversations[i // num_samples]
        start = len(prompts[i // num_samples])
        reply, _ = split_reply(engine.tokenizer, sequence[start:], masks[i][start:])
        rewards[i] = task.reward(conversation, reply)
        if not math.isfinite(rewards[i]):
            raise UserError(f"the reward of problem {problems[i // num_samples]} is {rewards[i]}")
    shape = (len(problems), num_samples)
    stops = engine.tokenizer.stop_token_ids
    return Rollouts(
        sequences,
        masks,
        rewards.reshape(shape),
        np.array([sum(m) for m in masks]).reshape(shape),
        np.array([s[-1] in stops and m[-1] == 1 for s, m in zip(sequences, masks)]).reshape(shape),
    )


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of its group: (prompts, samples) -> same."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def to_batches(
    rollouts: Rollouts, device_batch_size: int, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """Micro-batches of the replies whose group has variance; the others teach nothing.

    Loss is on sampled tokens only, the stop token included: without it ending would never be
    reinforced. Replies of similar length share a micro-batch; the last one may be smaller, and no
    reply is left out."""
    weights = advantages(rollouts.rewards)
    useful = np.repeat(np.ptp(rollouts.rewards, axis=1) > 0, weights.shape[1])
    rows: list[int] = np.flatnonzero(useful).tolist()
    rows.sort(key=lambda i: len(rollouts.sequences[i]))
    batches = []
    for at in range(0, len(rows), device_batch_size):
        chunk = rows[at : at + device_batch_size]
        T = max(len(rollouts.sequences[i]) for i in chunk) - 1
        idx = torch.full((len(chunk), T), pad_id, dtype=torch.int64)
        targets = torch.full((len(chunk), T), IGNORE, dtype=torch.int64)
        for row, i in enumerate(chunk):
            ids = torch.tensor(rollouts.sequences[i])
            sampled = torch.tensor(rollouts.masks[i][1:], dtype=torch.bool)
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(sampled, ids[1:], IGNORE)
        scale = torch.tensor([weights.flat[i] for i in chunk], dtype=torch.float32)  # (B,)
        batches.append(
            MicroBatch(idx.to(device), targets.to(device), scale[:, None].expand(-1, T).to(device))
        )
    return batches
