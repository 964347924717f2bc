"""
How a token is chosen: shares by hand, and what transformers' logits processors leave over.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nanochat.sampling import Choice, Sampling


def sample(
    logits: Tensor, temperature: float, top_k: int | None, uniforms: Sequence[float]
) -> list[int]:
    """All rows by the same settings."""
    rows = [Sampling(temperature=temperature, top_k=top_k)] * len(uniforms)
    return Choice(rows, logits.size(-1))(logits, uniforms).tolist()


# ---- sampling ------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution() -> None:
    """Uniform numbers on a fine grid give every token its share, to one grid point."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    n = 1000
    for temperature in (0.5, 1.0, 2.0):
        tokens = sample(logits.expand(n, -1), temperature, None, [(i + 0.5) / n for i in range(n)])
        for token, p in enumerate((logits / temperature).softmax(-1)):
            assert abs(tokens.count(token) - n * float(p)) <= 1


def test_top_k_renormalises_among_the_k_likeliest() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    n = 1000
    tokens = sample(logits.expand(n, -1), 1.0, 2, [(i + 0.5) / n for i in range(n)])
    share = float(torch.tensor([2.0, 0.3]).softmax(0)[0])
    assert set(tokens) == {0, 2}
    assert abs(tokens.count(2) - n * share) <= 1


def test_top_k_at_its_limits() -> None:
    """0, None, V and more mean all tokens; 1 is the likeliest, whatever the temperature."""
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    uniforms = [(i + 0.5) / 50 for i in range(50)]
    everything = sample(logits, 1.0, None, uniforms)
    for top_k in (0, 7, 8, 1000, -1):
        assert sample(logits, 1.0, top_k, uniforms) == everything
    likeliest = logits.argmax(-1).tolist()
    assert sample(logits, 5.0, 1, uniforms) == likeliest != everything
    assert sample(logits, 0.0, None, uniforms) == sample(logits, 0.0, 3, uniforms) == likeliest


def test_top_k_counts_tokens_even_among_equals() -> None:
    tokens = sample(torch.zeros(100, 5), 1.0, 2, [i / 100 for i in range(100)])
    assert len(set(tokens)) == 2


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.4999, 0.5001, 1 - 2**-25, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_sampled(uniform: float) -> None:
    """At both ends, where rounding to float32 is tempted to step over them."""
    never = float("-inf")
    logits = torch.tensor([[never, 1.0, never, 1.0, never]])
    assert sample(logits, 1.0, None, [uniform]) == [1 if uniform < 0.5 else 3]
    assert sample(logits, 1.0, 2, [uniform])[0] in (1, 3)


def test_low_temperature_does_not_overflow() -> None:
    assert sample(torch.tensor([[10.0, 15.0, -15.0]]), 1e-4, None, [0.5]) == [1]
