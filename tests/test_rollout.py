"""
Which problems, which replies, and what of them is trained. The loss: test_policy.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.reply import split_reply
from nanochat.rollout import (
    Rollouts,
    advantages,
    problem_order,
    sample_rollouts,
    spare_problems,
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


def test_by_the_deviation_every_group_weighs_alike() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 20.0]])
    found = advantages(rewards, by_std=True)
    for row, group in zip(found[[0, 2]], rewards[[0, 2]].tolist()):
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        assert row.tolist() == pytest.approx([(r - mean) / std for r in group])
    assert found[1].tolist() == [0.0] * 4


def test_rounding_is_no_variance() -> None:
    rollouts = make_rollouts()
    rollouts.rewards = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3], [0, 0, 0, 0], [0, 0, 0, 1e-9]])
    assert rollouts.useful.tolist() == [False, False, True]


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
    log_probs = [(-3.0 * rng.random(len(m)) * m).tolist() for m in masks]
    return Rollouts(sequences, masks, rewards, lengths, np.ones((3, 4), dtype=bool), log_probs)


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


def test_advantages_and_log_probabilities_stand_in_their_rows() -> None:
    rollouts = make_rollouts()
    flat = advantages(rollouts.rewards).flatten()
    by_reply = {tuple(s[:-1]): i for i, s in enumerate(rollouts.sequences)}
    for b in to_batches(rollouts, 3, pad_id=95, device=CPU):
        assert b.advantages is not None and b.advantages.shape == (len(b.idx), 1)
        assert b.sampled is not None and b.sampled.shape == b.idx.shape
        rows = zip(b.idx.tolist(), b.advantages[:, 0].tolist(), b.sampled.tolist())
        for idx, advantage, log_probs in rows:
            i = by_reply[tuple(t for t in idx if t != 95)]
            assert advantage == pytest.approx(flat[i])
            padding = [0.0] * (len(idx) + 1 - len(rollouts.log_probs[i]))
            assert log_probs == pytest.approx(rollouts.log_probs[i][1:] + padding)


def test_replies_of_similar_length_share_a_batch() -> None:
    lengths = [b.idx.size(1) for b in to_batches(make_rollouts(), 2, pad_id=95, device=CPU)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


def test_remainders_are_batches_too() -> None:
    """8 useful replies in micro-batches of 1, 2, 3, 5, 8 and 100: none is left out."""
    for size in (1, 2, 3, 5, 8, 100):
        sizes = [len(b.idx) for b in to_batches(make_rollouts(), size, pad_id=0, device=CPU)]
        assert sizes == [min(size, 8 - at) for at in range(0, 8, size)]


def test_a_batch_of_tokens_is_full_and_no_fuller() -> None:
    """Padding counts; a reply that is too long for any batch has one of its own."""
    rollouts = make_rollouts()
    whole = to_batches(rollouts, 100, 0, CPU)[0]
    for most in (1, 20, 30, 50, 1000):
        batches = to_batches(rollouts, 1, 0, CPU, max_tokens=most)
        rows = [row.tolist() for b in batches for row in b.idx]
        assert sorted(r[: sum(1 for t in r if t)] for r in rows) == sorted(
            r[: sum(1 for t in r if t)] for r in whole.idx.tolist()
        )
        for b in batches:
            assert b.idx.numel() <= most or len(b.idx) == 1
        for b in batches[:-1]:
            assert (len(b.idx) + 1) * b.idx.size(1) > most
    assert len(to_batches(rollouts, 1, 0, CPU, max_tokens=1000)) == 1


def test_groups_without_variance_give_no_batches() -> None:
    rollouts = make_rollouts()
    rollouts.rewards[:] = 1.0
    assert to_batches(rollouts, 4, pad_id=0, device=CPU) == []


def test_further_problems() -> None:
    """None twice in a step, none that is there already, and not more than there are."""
    assert spare_problems(9, 5, [3, 4], 0) == []
    found = spare_problems(9, 5, [3, 4], 5)
    assert len(set(found)) == 5 and not {3, 4} & set(found)
    assert sorted(spare_problems(9, 5, [3, 4], 100)) == [0, 1, 2, 5, 6, 7, 8]
    assert found != spare_problems(9, 6, [3, 4], 5)


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


def sample(engine: Engine, problems: list[int], **changes: Any) -> Rollouts:
    task = Longest()
    return sample_rollouts(engine, task, problems, reward=task.reward, **{**SETTINGS, **changes})


def test_rollouts_hold_what_was_sampled_and_what_it_earned(engine: Engine) -> None:
    task = Longest()
    rollouts = sample_rollouts(engine, task, [4, 9], reward=task.reward, **SETTINGS)
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
    together = sample(engine, [4, 9, 2])
    for rank, problem in enumerate([4, 9, 2]):
        alone = sample(engine, [problem])
        assert alone.sequences == together.sequences[3 * rank : 3 * rank + 3]
    other = sample(engine, [4], seed=6)
    assert other.sequences != together.sequences[:3]


def test_a_rank_without_a_problem_has_no_replies(engine: Engine) -> None:
    nothing = sample(engine, [])
    assert nothing.rewards.shape == (0, 3) and nothing.useful.tolist() == []
    assert to_batches(nothing, 2, pad_id=0, device=CPU) == []
    some = sample(engine, [4, 9])
    for both in (nothing + some, some + nothing):
        assert both.sequences == some.sequences and (both.rewards == some.rewards).all()
        assert both.log_probs == some.log_probs and both.ended.dtype == bool


def test_further_replies_come_after_the_first(engine: Engine) -> None:
    both, at_once = sample(engine, [4]) + sample(engine, [9, 2]), sample(engine, [4, 9, 2])
    assert both.sequences == at_once.sequences and both.masks == at_once.masks
    assert (both.rewards == at_once.rewards).all() and (both.lengths == at_once.lengths).all()


def test_a_reward_that_is_not_finite_is_refused(engine: Engine) -> None:
    task = Longest()
    with pytest.raises(UserError, match=r"reward of problem 9 is nan.*problem: 'Problem 9!"):
        sample_rollouts(engine, task, [9], reward=lambda problem, reply: float("nan"), **SETTINGS)


def test_rollouts_are_broken_off(engine: Engine) -> None:
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    rollouts = sample(engine, [4, 9], stopped=stopped)
    assert rollouts.lengths.max() == 4 and rollouts.rewards.shape == (2, 3)
