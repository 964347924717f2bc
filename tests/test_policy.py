"""
Reinforcement learning's loss against a dense reference: one token at a time, in float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat.common import seed_from
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.policy import Policy, PolicyBatch, compared, frozen_copy, policy_losses
from nanochat.rollout import Rollouts, sample_rollouts, to_batches
from tests.models_for_tests import tiny_model
from tests.test_rollout import CPU, Longest, make_rollouts
from tests.tokenizers_for_tests import tiny_tokenizer

VOCAB = 91  # the tiny models have 96 rows: five of them have no token


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def log_prob(model: Any, before: list[int], token: int) -> Tensor:
    return model(torch.tensor([before]))[0, -1, :VOCAB].log_softmax(-1)[token]


def dense_loss(
    model: Any,
    rollouts: Rollouts,
    old: Any,
    reference: Any,
    *,
    by_std: bool,
    clip: float,
    kl: float,
) -> Tensor:
    """The definition, a token at a time: over all sampled tokens of the groups with variance."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, (sequence, mask) in enumerate(zip(rollouts.sequences, rollouts.masks)):
        group = rollouts.rewards[i // 4].tolist()
        if all(reward == group[0] for reward in group):
            continue
        mean = sum(group) / 4
        advantage = group[i % 4] - mean
        if by_std:
            advantage /= math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        for at in range(1, len(sequence)):
            if not mask[at]:
                continue
            now = log_prob(model, sequence[:at], sequence[at])
            with torch.no_grad():
                was = log_prob(old, sequence[:at], sequence[at])
                begun = log_prob(reference, sequence[:at], sequence[at])
            ratio = (now - was).exp()
            gain = ratio * advantage
            if clip:
                limit = 1 + clip if advantage > 0 else 1 - clip
                beyond = ratio > limit if advantage > 0 else ratio < limit
                gain = torch.where(beyond, limit * advantage, gain)  # beyond it nothing is gained
            penalty = ratio * ((begun - now).exp() - (begun - now) - 1)
            total = total - gain + kl * penalty
            count += 1
    return total / count


def seen(policy: Policy, batches: list[PolicyBatch]) -> dict[str, float]:
    """The passes of a first step, and what they saw."""
    for batch in batches:
        policy(batch)
    return compared(batches)


def nudged(model: Any, seed: int) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return other


CASES: list[dict[str, Any]] = [
    {"by_std": False, "clip": 0.0, "kl": 0.0, "moved": False},  # the default
    {"by_std": True, "clip": 0.0, "kl": 0.0, "moved": False},
    {"by_std": False, "clip": 0.2, "kl": 0.0, "moved": False},  # the first step clips nothing
    {"by_std": False, "clip": 0.05, "kl": 0.0, "moved": True},
    {"by_std": True, "clip": 0.05, "kl": 0.3, "moved": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_the_gradient_is_the_dense_references_however_it_is_batched(
    arch: str, case: dict[str, Any]
) -> None:
    model, rollouts = tiny_model(arch).double(), make_rollouts()
    old = nudged(model, 1) if case["moved"] else copy.deepcopy(model)
    reference = nudged(model, 2)
    settings = {name: case[name] for name in ("clip", "kl")}
    expected = dense_loss(model, rollouts, old, reference, by_std=case["by_std"], **settings)
    wanted = gradients(model, expected)
    for size in (1, 3, 5, 100):
        batches = to_batches(rollouts, size, 0, CPU, by_std=case["by_std"])
        policy = Policy(
            model, model, VOCAB, reference=reference if case["kl"] else None, **settings
        )
        policy.begin(batches)
        if case["moved"]:  # as if steps had been taken since
            seen(Policy(old, old, VOCAB), batches)
        count = sum(int((b.targets != IGNORE).sum()) for b in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for b in batches:  # as TrainStep sums them
            loss = loss + policy(b)
        # What is computed in float32, whatever the model: the advantages, and the head's product
        assert (loss / count).item() == pytest.approx(expected.item(), abs=2e-6)
        for name, gradient in gradients(model, loss / count).items():
            assert wanted[name].abs().max() > 1e-7, f"{name} says nothing"
            assert torch.allclose(gradient, wanted[name], atol=2e-6, rtol=1e-4), (name, size)


def test_the_cases_clip_some_and_not_all() -> None:
    """Else the test above would hold for a loss that clips all or nothing."""
    model, rollouts = tiny_model("gpt"), make_rollouts()
    batches = to_batches(rollouts, 100, 0, CPU)
    seen(Policy(nudged(model, 1), nudged(model, 1), VOCAB), batches)
    (batch,) = batches
    Policy(model, model, VOCAB)(batch)
    log_probs = batch.now
    assert log_probs is not None
    losses = [policy_losses(log_probs, batch, clip) for clip in (0.0, 0.05)]
    clipped = (losses[0] != losses[1])[batch.targets != IGNORE]
    assert 0.05 < clipped.float().mean() < 0.95


def test_clip_by_hand() -> None:
    """A ratio of 1.5 and 0.5, an advantage of 1 and -1, epsilon 0.2."""
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    old = torch.full((1, 4), -2.0)
    batch = PolicyBatch(
        torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 1]]),
        advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0]]), old=old,
    )  # fmt: skip
    log_probs = (old + ratios.log()).requires_grad_()
    losses = policy_losses(log_probs, batch, clip=0.2)
    assert losses.tolist()[0] == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    losses.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist()[0] == pytest.approx([0.0, -0.5, 1.5, 0.0])
    assert policy_losses(log_probs, batch).tolist()[0] == pytest.approx([-1.5, -0.5, 1.5, 0.5])


def test_the_penalty_is_the_divergence_in_the_mean() -> None:
    """Over tokens drawn from the policy, k3 estimates KL(policy || reference)."""
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    tokens = rng.choice(3, 40_000, p=p)
    batch = PolicyBatch(
        torch.zeros(1, 40_000, dtype=torch.int64), torch.ones(1, 40_000, dtype=torch.int64),
        advantages=torch.zeros(1, 1), reference=torch.tensor(np.log(q)[tokens])[None],
    )  # fmt: skip
    losses = policy_losses(torch.tensor(np.log(p)[tokens])[None], batch, kl=1.0)
    assert float(losses.mean()) == pytest.approx(float((p * np.log(p / q)).sum()), rel=0.03)
    assert losses.min() >= 0


def test_the_penaltys_gradient_is_the_divergences() -> None:
    """Over all tokens, each as often as the policy draws it: exactly. (Without the ratio, it would
    be the gradient of another divergence.)"""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    p = scores.log_softmax(-1)
    (wanted,) = torch.autograd.grad((p.exp() * (p - q)).sum(), scores, retain_graph=True)
    batch = PolicyBatch(
        torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64),
        advantages=torch.zeros(1, 1), reference=q[None],
    )  # fmt: skip
    losses = policy_losses(p[None], batch, kl=1.0)[0]
    (found,) = torch.autograd.grad((p.exp().detach() * losses).sum(), scores)
    assert found.tolist() == pytest.approx(wanted.tolist())


# ---- what the engine samples from is what is trained ---------------------------------------------


@pytest.fixture
def padded() -> Engine:
    """A model with 60 rows that no token of the tokenizer has, and replies with tool calls."""
    tokenizer = copy.copy(tiny_tokenizer(400))
    tokenizer.stop_token_ids = tokenizer.stop_token_ids | set(range(97, 105))
    return Engine(tiny_model("qwen2.5", vocab_size=460), tokenizer)


def rollouts_of(engine: Engine, **changes: Any) -> Rollouts:
    settings = {
        "num_samples": 4,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_k": None,
        "seed": 5,
    }
    return sample_rollouts(
        engine, Longest(), [4, 9, 1], reward=lambda problem, reply: seed_from(reply) % 97,
        **{**settings, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"temperature": 0.7}], ids=str)
def test_the_engines_log_probabilities_are_the_trainers(
    padded: Engine, changes: dict[str, Any]
) -> None:
    """Whatever the replies were sampled with: the log-probabilities are of the model itself."""
    rollouts = rollouts_of(padded, **changes)
    for sequence, mask, values in zip(rollouts.sequences, rollouts.masks, rollouts.log_probs):
        logits = padded.model(torch.tensor([sequence[:-1]]))[0, :, :400]
        wanted = logits.log_softmax(-1)[range(len(sequence) - 1), sequence[1:]]
        assert values[0] == 0.0
        assert values[1:] == pytest.approx((wanted * torch.tensor(mask[1:])).tolist(), abs=1e-4)
    batches = to_batches(rollouts, 5, 0, CPU)
    policy = Policy(padded.model, padded.model, 400)
    found = seen(policy, batches)
    assert found["tokens"] == sum(int((b.targets != IGNORE).sum()) for b in batches) > 30
    assert found["diff_max"] < 1e-4 and found["diff"] < 1e-4 * found["tokens"]
    # and it would tell: over all rows of the head they differ
    wide = seen(Policy(padded.model, padded.model, 460), batches)
    assert (
        wide["diff"] > 0.05 * wide["tokens"] and wide["diff_max"] >= wide["diff"] / wide["tokens"]
    )


def test_the_first_step_sees_the_replies_as_they_were_before_it(padded: Engine) -> None:
    """Its own passes are what the engine is compared with and what the ratios of later steps start
    from: no pass more than the steps need, however many there are."""
    model, batches = padded.model, to_batches(rollouts_of(padded), 5, 0, CPU)
    passes = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        passes.append(args)
        return model(*args, **kwargs)

    policy = Policy(model, forward, 460)
    first = seen(policy, batches)
    before = [b.old for b in batches]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05
    for batch in batches:
        policy(batch)
    assert len(passes) == 2 * len(batches) and first["tokens"] > 30
    for batch, old in zip(batches, before):
        assert batch.old is old and batch.now is not None and old is not None
        assert (batch.now - old).abs().max() > 1e-2
    assert compared([])["tokens"] == 0


def test_the_reference_stays_what_it_was(
    padded: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    model = padded.model
    reference = frozen_copy(model)
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    assert f"a frozen copy of the model takes {size:,.0f} MiB" in capsys.readouterr().out
    assert not any(p.requires_grad for p in reference.parameters())
    batches = to_batches(rollouts_of(padded), 5, 0, CPU)
    policy = Policy(model, model, 400, kl=0.1, reference=reference)
    policy.begin(batches)
    assert seen(policy, batches)["kl"] == pytest.approx(0.0, abs=1e-5)
    before = [b.reference for b in batches]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05
    policy.begin(batches)
    assert seen(policy, batches)["kl"] > 1.0
    assert all(
        torch.equal(a, b.reference) for a, b in zip(before, batches) if b.reference is not None
    )


def test_rows_without_a_token_get_no_gradient(padded: Engine) -> None:
    batches = to_batches(rollouts_of(padded), 5, 0, CPU)
    policy = Policy(padded.model, padded.model, 400)
    policy.begin(batches)
    sum(policy(b) for b in batches).backward()  # type: ignore[union-attr]
    grad = padded.model.param_groups()["head"][0].grad
    assert (grad[400:] == 0).all() and grad[:400].abs().max() > 1e-4
