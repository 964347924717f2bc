"""
How a token is chosen: shares by hand, and what transformers' logits processors leave over.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
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


# ---- each row by its own settings ----------------------------------------------------------------

VOCAB = 60
SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=7),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=0.5, top_k=20, top_p=0.7, min_p=0.05),
    Sampling(repetition_penalty=1.8),
    Sampling(temperature=0.8, top_k=9, repetition_penalty=0.6),
    Sampling(top_p=1e-6),
    Sampling(min_p=1.0),
    Sampling(temperature=0.0, repetition_penalty=3.0),
]


def shares_by_transformers(logits: Tensor, seen: Tensor, settings: Sampling) -> Tensor:
    """(V,) logits, (n,) ids of the text -> (V,): what its processors, in its order, leave over."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    scores, ids = logits[None], seen[None]
    if settings.repetition_penalty != 1:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        scores = penalty(ids, scores)
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(-1), logits.numel())[0].float()
    scores = transformers.TemperatureLogitsWarper(settings.temperature)(ids, scores)
    if settings.top_k:
        scores = transformers.TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1:
        scores = transformers.TopPLogitsWarper(settings.top_p)(ids, scores)
    if settings.min_p > 0:
        scores = transformers.MinPLogitsWarper(settings.min_p)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_token_has_the_share_that_transformers_gives_it(settings: Sampling) -> None:
    """Uniform numbers on a fine grid, to one grid point."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(VOCAB, generator=generator)
    seen = torch.randint(0, VOCAB, (15,), generator=generator)
    n = 4000
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[seen] = True
    tokens = Choice([settings] * n, VOCAB)(
        logits.expand(n, -1), [(i + 0.5) / n for i in range(n)], mask.expand(n, -1)
    )
    found = torch.bincount(tokens, minlength=VOCAB)
    wanted = n * shares_by_transformers(logits, seen, settings)
    assert (found - wanted).abs().max() <= 1.5
    assert (found[wanted == 0] == 0).all()


def test_rows_of_all_settings_share_a_batch() -> None:
    """A row's token is the same alone, in a batch of its like, and among all others."""
    generator = torch.Generator().manual_seed(1)
    rows = [SETTINGS[i % len(SETTINGS)] for i in range(100)]
    logits = 2 * torch.randn(100, VOCAB, generator=generator)
    seen = torch.rand(100, VOCAB, generator=generator) < 0.2
    uniforms = torch.rand(100, generator=generator).tolist()
    together = Choice(rows, VOCAB)(logits, uniforms, seen).tolist()
    for i, settings in enumerate(rows):
        alone = Choice([settings], VOCAB)(logits[i : i + 1], uniforms[i : i + 1], seen[i : i + 1])
        assert alone.tolist() == [together[i]], settings
    assert len(set(together)) > 20


def test_top_p_of_a_large_vocabulary() -> None:
    """With and without the short cut, which looks at the likeliest 1,024 tokens first."""
    n, vocab = 400, 5000
    uniforms = [(i + 0.5) / n for i in range(n)]
    for sharpness in (3.0, 0.01):  # the nucleus is 40 tokens, and nearly all of them
        logits = sharpness * torch.randn(vocab, generator=torch.Generator().manual_seed(2))
        tokens = Choice([Sampling(top_p=0.9)] * n, vocab)(logits.expand(n, -1), uniforms)
        probs, order = logits.softmax(-1).sort(descending=True)
        nucleus = order[: int((probs.cumsum(0) < 0.9).sum()) + 1]
        assert set(tokens.tolist()) <= set(nucleus.tolist())
        cdf = logits.softmax(-1)[nucleus].cumsum(0)
        wanted = nucleus[torch.searchsorted(cdf / cdf[-1], torch.tensor(uniforms))]
        assert (tokens == wanted).float().mean() > 0.99  # rounding may move a few by one place


@pytest.mark.parametrize(
    "field, value",
    [("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1),
     ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
     ("min_p", 1.1), ("repetition_penalty", 0.0), ("logprobs", 21), ("logprobs", -1),
     ("stop", ("",))],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_name(field: str, value: object) -> None:
    Sampling().check()
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value}).check()  # type: ignore[arg-type]


def test_the_order_among_equals_does_not_depend_on_the_other_rows() -> None:
    """A row whose nucleus is small goes through topk, which orders ties in its own way; it must
    choose the same beside a row whose nucleus is nearly everything."""
    equal = torch.zeros(1, 3000)
    equal[0, ::3] = 5.0  # a thousand likeliest tokens
    rows = [Sampling(top_p=0.5), Sampling(top_p=0.999)]
    uniforms = [i / 50 for i in range(50)]
    alone = [int(Choice(rows[:1], 3000)(equal, [u])) for u in uniforms]
    flat = torch.zeros(1, 3000)
    both = [int(Choice(rows, 3000)(torch.cat((equal, flat)), [u, 0.5])[0]) for u in uniforms]
    assert alone == both
