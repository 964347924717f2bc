"""
Reinforcement learning's arithmetic against a dense reference, one token at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.evals.chat import split_reply
from nanochat.rollout import (
    Rollouts,
    advantages,
    problem_order,
    sample_rollouts,
    to_batches,
)
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_tokenizer

CPU = torch.device("cpu")

# ---- which problems ------------------------------------------------------------------------------


def test_every_epoch_has_every_problem_once() -> None:
    order = problem_order(7, seed=3, start=0, count=28)
    epochs = [order[at : at + 7] for at in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch is shuffled anew"
    assert order != problem_order(7, seed=4, start=0, count=28)


def test_the_order_does_not_depend_on_where_one_begins() -> None:
    """So that a resumed run sees the same problems, also across the end of an epoch."""
    order = problem_order(5, seed=0, start=0, count=20)
    for start in range(15):
        assert problem_order(5, seed=0, start=start, count=4) == order[start : start + 4]


# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_are_distances_from_the_mean_of_the_group() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    assert advantages(rewards).tolist() == [
        [0.5, -0.5, -0.5, 0.5],
        [0.0, 0.0, 0.0, 0.0],
        [-0.5, -0.5, -0.5, 1.5],  # not divided by the deviation
    ]


# ---- batches -------------------------------------------------------------------------------------

STOP = 90


def make_rollouts() -> Rollouts:
    """3 problems x 4 replies, of all lengths, with forced tokens; the second group is all right."""
    rng = np.random.default_rng(0)
    sequences, masks = [], []
    for i in range(12):
        prompt = 2 + i // 4
        mask = [0] * prompt + [1] * int(rng.integers(1, 9))
        if i % 3 == 0:
            mask[prompt + 1 : prompt + 1] = [0, 0]  # tool output after the first token
            mask.append(1)
        sequences.append([*rng.integers(0, 90, len(mask) - 1).tolist(), STOP])
        masks.append(mask)
    rewards = np.array([[1.0, 0.0, 0.0, 0.25], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
    lengths = np.array([sum(m) for m in masks]).reshape(3, 4)
    return Rollouts(sequences, masks, rewards, lengths, np.ones((3, 4), dtype=bool))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def dense_loss(model: Any, rollouts: Rollouts) -> Tensor:
    """-log p * advantage, summed token by token over the sampled ones, over their number."""
    total, count = torch.zeros(()), 0
    for i, (sequence, mask) in enumerate(zip(rollouts.sequences, rollouts.masks)):
        group = rollouts.rewards[i // 4]
        if all(reward == group[0] for reward in group):
            continue
        advantage = group[i % 4] - sum(group) / 4
        for at in range(1, len(sequence)):
            if mask[at]:
                log_probs = model(torch.tensor([sequence[:at]]))[0, -1].log_softmax(-1)
                total = total - log_probs[sequence[at]] * float(advantage)
                count += 1
    return total / count


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_the_gradient_is_the_dense_references_however_it_is_batched(arch: str) -> None:
    """With remainders: 8 useful replies in micro-batches of 1, 2, 3, 5, 8 and 100."""
    model, rollouts = tiny_model(arch), make_rollouts()
    wanted = gradients(model, dense_loss(model, rollouts))
    for size in (1, 2, 3, 5, 8, 100):
        batches = to_batches(rollouts, size, pad_id=0, device=CPU)
        assert [len(b.idx) for b in batches] == [min(size, 8 - at) for at in range(0, 8, size)]
        count = sum(int((b.targets != IGNORE).sum()) for b in batches)
        loss = torch.zeros(())
        for b in batches:  # as Trainer.step sums them
            assert b.weights is not None
            loss = loss + (model(b.idx, b.targets, reduction="none") * b.weights).sum()
        for name, gradient in gradients(model, loss / count).items():
            assert wanted[name].abs().max() > 1e-7, f"{name} says nothing"
            assert torch.allclose(gradient, wanted[name], atol=2e-6, rtol=1e-4), (name, size)


def test_what_is_trained_is_what_was_sampled() -> None:
    """Every sampled token and the stop token; no prompt, no tool output, no padding."""
    rollouts = make_rollouts()
    wanted = sorted(
        [(t, m) for t, m in zip(s[1:], mask[1:])]
        for i, (s, mask) in enumerate(zip(rollouts.sequences, rollouts.masks))
        if i // 4 != 1  # a group without variance teaches nothing
    )
    found = []
    for b in to_batches(rollouts, 3, pad_id=95, device=CPU):
        assert b.idx.shape == b.targets.shape
        for idx, targets in zip(b.idx.tolist(), b.targets.tolist()):
            length = idx.index(95) if 95 in idx else len(idx)  # 95 occurs as padding only
            assert set(idx[length:]) <= {95} and set(targets[length:]) <= {IGNORE}
            assert targets[length - 1] == STOP, "the end is trained"
            # the input runs one behind; a target is ignored or the token that comes next
            following = [*idx[1:length], STOP]
            assert all(t in (n, IGNORE) for t, n in zip(targets, following))
            found.append([(n, int(t != IGNORE)) for t, n in zip(targets, following)])
    assert sorted(found) == wanted


def test_weights_are_the_advantages_of_their_rows() -> None:
    rollouts = make_rollouts()
    by_reply = {
        tuple(s[:-1]): a for s, a in zip(rollouts.sequences, advantages(rollouts.rewards).flat)
    }
    for b in to_batches(rollouts, 3, pad_id=95, device=CPU):
        assert b.weights is not None and b.weights.shape == b.idx.shape
        for idx, weights in zip(b.idx.tolist(), b.weights.tolist()):
            reply = tuple(t for t in idx if t != 95)
            assert weights == pytest.approx([by_reply[reply]] * len(weights))


def test_replies_of_similar_length_share_a_batch() -> None:
    lengths = [b.idx.size(1) for b in to_batches(make_rollouts(), 2, pad_id=95, device=CPU)]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1


def test_groups_without_variance_give_no_batches() -> None:
    rollouts = make_rollouts()
    rollouts.rewards[:] = 1.0
    assert to_batches(rollouts, 4, pad_id=0, device=CPU) == []


# ---- sampling ------------------------------------------------------------------------------------


class Longest:
    """A task that likes long replies, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": f"Problem {i}" + "!" * i},
                {"role": "assistant", "content": "the answer, which must not be shown"},
            ]
        }

    def reward(self, conversation: dict[str, Any], reply: str) -> float:
        self.seen.append((conversation["messages"][0]["content"], reply))
        return float(len(reply))


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = copy.copy(tiny_tokenizer(400))  # the original is shared by all tests
    # Random models rarely stop: a few letters are made stop tokens, so that some replies end
    tokenizer.stop_token_ids = tokenizer.stop_token_ids | set(range(97, 105))
    return Engine(tiny_model("gpt", vocab_size=400), tokenizer)


SETTINGS: dict[str, Any] = {
    "num_samples": 3, "max_new_tokens": 12, "temperature": 1.0, "top_k": None, "seed": 5
}  # fmt: skip


def test_rollouts_hold_what_was_sampled_and_what_it_earned(engine: Engine) -> None:
    task = Longest()
    rollouts = sample_rollouts(engine, task, [4, 9], **SETTINGS)
    assert rollouts.rewards.shape == rollouts.lengths.shape == rollouts.ended.shape == (2, 3)
    for i, (sequence, mask) in enumerate(zip(rollouts.sequences, rollouts.masks)):
        problem = [4, 9][i // 3]
        prompt = engine.tokenizer.render_for_completion(task[problem])
        assert sequence[: len(prompt)] == prompt and not any(mask[: len(prompt)])
        reply, _ = split_reply(engine.tokenizer, sequence[len(prompt) :], mask[len(prompt) :])
        assert task.seen[i] == (f"Problem {problem}" + "!" * problem, reply)
        assert rollouts.rewards[i // 3, i % 3] == len(reply)
        assert rollouts.lengths[i // 3, i % 3] == sum(mask)
        assert rollouts.ended[i // 3, i % 3] == (sequence[-1] in engine.tokenizer.stop_token_ids)
    assert 0 < rollouts.ended.sum() < 6, "both kinds of end are needed here"


def test_replies_do_not_depend_on_the_rank_a_problem_falls_to(engine: Engine) -> None:
    together = sample_rollouts(engine, Longest(), [4, 9, 2], **SETTINGS)
    for rank, problem in enumerate([4, 9, 2]):
        alone = sample_rollouts(engine, Longest(), [problem], **SETTINGS)
        assert alone.sequences == together.sequences[3 * rank : 3 * rank + 3]
    other = sample_rollouts(engine, Longest(), [4], **{**SETTINGS, "seed": 6})
    assert other.sequences != together.sequences[:3]


def test_a_reward_that_is_not_finite_is_refused(engine: Engine) -> None:
    class Broken(Longest):
        def reward(self, conversation: dict[str, Any], reply: str) -> float:
            return float("nan")

    with pytest.raises(UserError, match="reward of problem 9 is nan"):
        sample_rollouts(engine, Broken(), [9], **SETTINGS)


def test_rollouts_are_broken_off(engine: Engine) -> None:
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    rollouts = sample_rollouts(engine, Longest(), [4, 9], **SETTINGS, stopped=stopped)
    assert rollouts.lengths.max() == 4 and rollouts.rewards.shape == (2, 3)
