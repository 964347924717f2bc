"""
The shared leaves against plain loops: norm, rotary positions, attention, the loss.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.models import layers
from nanochat.models.layers import (
    Rotary,
    apply_rotary,
    attention,
    lm_logits,
    matmul_flops_per_token,
    rms_norm,
    token_losses,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(head_dim: int, theta: float, length: int, direction: int = 1) -> Rotary:
    rotary = Rotary(head_dim, theta, length, direction)
    rotary.fill()
    return rotary


class At:
    """As much of a cache as the rotary table asks for: (B, T) positions."""

    def __init__(self, positions: Tensor) -> None:
        self.table = positions

    def positions(self, T: int) -> Tensor:
        return self.table

    def end(self, T: int) -> int:
        return int(self.table.max()) + 1


def at(positions: Tensor) -> Any:
    return At(positions)


# ---- norm ----------------------------------------------------------------------------------------


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    assert torch.allclose(rms_norm(x), x / math.sqrt(12.5 + 1e-6))
    weight = torch.tensor([2.0, -1.0])
    assert torch.allclose(rms_norm(x, weight, 0.5), x / math.sqrt(13.0) * weight)


# ---- rotary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [1, -1])
def test_rotary_turns_each_pair_of_channels(direction: int) -> None:
    """Channel i and its partner i + E/2 are one complex number, turned by position * frequency."""
    E, theta = 6, 100.0
    x = random(1, 5, 2, E)  # (B, T, H, E)
    y = apply_rotary(x, *table(E, theta, 5, direction)(5))
    for t in range(5):
        for i in range(E // 2):
            angle = torch.tensor(direction * t * theta ** (-2 * i / E))
            number = torch.complex(x[0, t, :, i], x[0, t, :, i + E // 2])
            turned = number * torch.polar(torch.tensor(1.0), angle)
            assert torch.allclose(y[0, t, :, i], turned.real, atol=1e-5)
            assert torch.allclose(y[0, t, :, i + E // 2], turned.imag, atol=1e-5)


def test_rotary_scores_depend_on_distance_alone() -> None:
    """What positions are for: q at 7 sees k at 3 exactly as q at 104 sees k at 100."""
    rotary = table(8, 10_000.0, 128)
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def score(q_at: int, k_at: int) -> float:
        turned_q = apply_rotary(q, *rotary(1, at(torch.tensor([[q_at]]))))
        turned_k = apply_rotary(k, *rotary(1, at(torch.tensor([[k_at]]))))
        return float((turned_q * turned_k).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_rotary_positions_of_their_own_for_each_row() -> None:
    rotary = table(4, 10_000.0, 32)
    positions = torch.tensor([[0, 1, 2], [20, 21, 22]])
    cos, sin = rotary(3, at(positions))
    assert cos.shape == sin.shape == (2, 3, 1, 2)
    whole_cos, whole_sin = rotary(32)
    assert torch.equal(cos[1, :, 0], whole_cos[0, 20:23, 0])
    assert torch.equal(sin[1, :, 0], whole_sin[0, 20:23, 0])


@pytest.mark.parametrize("by_positions", [False, True])
def test_rotary_table_grows_on_demand(by_positions: bool) -> None:
    rotary = table(8, 10_000.0, 16, direction=-1)
    before = rotary.cos.clone()
    positions = torch.arange(60, 100)[None]
    cos, sin = rotary(40, at(positions)) if by_positions else rotary(100)
    fresh_cos, fresh_sin = table(8, 10_000.0, 100, direction=-1)(100)
    assert torch.equal(cos[:, -40:], fresh_cos[:, 60:])
    assert torch.equal(sin[:, -40:], fresh_sin[:, 60:])
    assert torch.equal(rotary.cos[:16], before), "growth must not move earlier positions"


def test_rotary_that_grew_in_inference_mode_still_serves_training() -> None:
    """RL samples past the table in inference mode, then trains the same model."""
    rotary = table(8, 10_000.0, 4)
    with torch.inference_mode():
        rotary(50)
    x = random(1, 50, 1, 8).requires_grad_()
    apply_rotary(x, *rotary(50)).square().sum().backward()
    assert x.grad is not None


def test_rotary_keeps_the_dtype_of_what_it_turns() -> None:
    x = random(1, 3, 1, 8).bfloat16()
    assert apply_rotary(x, *table(8, 10_000.0, 4)(3)).dtype == torch.bfloat16


def test_rotary_table_is_not_in_a_checkpoint() -> None:
    assert Rotary(8, 10_000.0, 4).state_dict() == {}


# ---- attention -----------------------------------------------------------------------------------


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 10**9) -> Tensor:
    """One query at a time: (T, H, E), (T, K, E), (T, K, E) -> (T, H * E)."""
    T, H, E = q.shape
    group = H // k.size(1)
    y = torch.zeros(T, H, E)
    for t in range(T):
        for h in range(H):
            seen = slice(max(0, t + 1 - window), t + 1)
            keys, values = k[seen, h // group], v[seen, h // group]
            weights = (keys @ q[t, h] / math.sqrt(E)).exp()
            y[t, h] = weights @ values / weights.sum()
    return y.flatten(1)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (3, 1), (6, 3)])
def test_attention_is_the_naive_one(heads: int, kv_heads: int) -> None:
    q = random(2, 7, heads, 4)
    k, v = random(2, 7, kv_heads, 4, seed=1), random(2, 7, kv_heads, 4, seed=2)
    y = attention(q, k, v)
    assert y.shape == (2, 7, heads * 4)
    for row in range(2):
        assert torch.allclose(y[row], naive_attention(q[row], k[row], v[row]), atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 7, 8, 100])
def test_a_window_hides_what_is_further_back(window: int) -> None:
    """Of 7 positions. A window of 1 is the token itself: the output is its own value."""
    q, k, v = (random(2, 7, heads, 4, seed=i) for i, heads in enumerate((4, 2, 2)))
    y = attention(q, k, v, window=window)
    for row in range(2):
        expected = naive_attention(q[row], k[row], v[row], window)
        assert torch.allclose(y[row], expected, atol=1e-5)
    if window == 1:
        assert torch.allclose(y.view(2, 7, 4, 4), v.repeat_interleave(2, dim=2), atol=1e-6)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window: int) -> None:
    q = random(1, 3, 1, 4)
    with pytest.raises(ValueError, match=f"window={window}"):
        attention(q, q, q, window=window)


# ---- loss ----------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """Each position's loss is log of the sum of exponentials minus the target's logit."""
    x, head = random(2, 3, 4), random(5, 4, seed=1)
    targets = torch.tensor([[1, -1, 4], [0, 2, -1]])
    nll = token_losses(x, head, targets, "none")
    assert nll.shape == (2, 3)
    expected = []
    for b in range(2):
        for t in range(3):
            logits = head @ x[b, t]
            target = int(targets[b, t])
            wanted = 0.0 if target < 0 else float(logits.exp().sum().log() - logits[target])
            assert float(nll[b, t]) == pytest.approx(wanted, abs=1e-5)
            expected.append(wanted)
    assert float(token_losses(x, head, targets, "sum")) == pytest.approx(sum(expected), abs=1e-5)
    assert float(token_losses(x, head, targets, "mean")) == pytest.approx(sum(expected) / 4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_batch_without_a_target_has_loss_zero(reduction: str) -> None:
    """Not NaN, and no NaN in the gradient either: such a micro-batch must not end a run."""
    x, head = random(2, 3, 4).requires_grad_(), random(5, 4, seed=1).requires_grad_()
    loss = token_losses(x, head, torch.full((2, 3), -1), reduction, softcap=15.0)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    for tensor in (x, head):
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_targets_need_not_be_contiguous(reduction: str) -> None:
    """A row of T + 1 tokens gives inputs [:, :-1] and targets [:, 1:], which is a view."""
    x, head = random(2, 4, 4), random(9, 4, seed=1)
    targets = torch.tensor([[0, 3, 8, -1, 2], [0, 1, 1, 5, 7]])[:, 1:]
    assert not targets.is_contiguous()
    loss = token_losses(x, head, targets, reduction)
    assert torch.equal(loss, token_losses(x, head, targets.contiguous(), reduction))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="average"):
        token_losses(random(1, 1, 4), random(5, 4), torch.zeros(1, 1, dtype=torch.int64), "average")


def test_softcap_by_hand() -> None:
    x, head = random(2, 3, 4), 20 * random(5, 4, seed=1)
    raw = lm_logits(x, head)
    capped = lm_logits(x, head, 15.0)
    assert torch.allclose(raw, x @ head.T, atol=1e-4)
    assert torch.allclose(capped, 15 * torch.tanh(raw / 15))
    assert raw.abs().max() > 30 and capped.abs().max() <= 15


def test_softcap_is_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head multiplies in bfloat16 on a GPU. 60 and 62 are two numbers there, but their capped
    values in bfloat16 are one: the cap comes after the cast."""
    monkeypatch.setattr(  # bfloat16 results without a bfloat16 kernel, which not every CPU has
        layers.F, "linear", lambda x, head: (x.float() @ head.float().T).bfloat16()
    )
    x, head = torch.ones(1, 1, 1).bfloat16(), torch.tensor([[60.0], [62.0]]).bfloat16()
    logits = lm_logits(x, head, 15.0)
    assert logits.dtype == torch.float32
    first, second = logits.flatten().tolist()
    assert second - first > 0.002
    in_bfloat16 = 15 * torch.tanh(F.linear(x, head) / 15).flatten()
    assert in_bfloat16[0] == in_bfloat16[1], "the example does not tell the two apart"


def test_flops_by_hand() -> None:
    # 6 * 1,000 weights, and 12 * 2 layers * width 8 * 16 positions
    assert matmul_flops_per_token(1000, n_layer=2, attn_width=8, seq_len=16) == 6000 + 3072
