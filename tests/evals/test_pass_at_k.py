"""pass@k against all the choices of k replies, and how often the interval holds the truth."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from nanochat.evals.pass_at_k import interval, pass_at_k, sampled_passes


def test_it_is_the_share_of_choices_with_a_right_one() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                choices = list(combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_what_cannot_be_estimated(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {c} right replies among {n}"):
        pass_at_k(n, c, k)


def test_the_estimate_is_unbiased() -> None:
    """Over many draws of n = 5 replies, its mean is 1 - (1 - p)^3; that of "any of 5" is not."""
    random, p = Random(0), 0.3
    counts = [sum(random.random() < p for _ in range(5)) for _ in range(20_000)]
    mean = sum(pass_at_k(5, c, 3) for c in counts) / len(counts)
    assert mean == pytest.approx(1 - (1 - p) ** 3, abs=0.01)


def test_the_interval_by_hand_and_at_its_ends() -> None:
    low, high = interval(
        0.5, 100
    )  # (0.5 + 1.96^2/200 +- 1.96 sqrt(0.0025 + 1.96^2/40000)) / 1.0384
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert interval(0.0, 50)[0] == 0.0 and 0.05 < interval(0.0, 50)[1] < 0.1
    assert interval(1.0, 50)[1] == pytest.approx(1.0) and 0.9 < interval(1.0, 50)[0] < 0.95


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_interval_holds_the_truth_about_95_times_in_100(p: float) -> None:
    random, n, held = Random(1), 100, 0
    for _ in range(2000):
        low, high = interval(sum(random.random() < p for _ in range(n)) / n, n)
        held += low <= p <= high
    assert 0.92 < held / 2000 < 0.99


def test_from_the_items_of_an_evaluation() -> None:
    items = [{"replies": [{"correct": i < c} for i in range(6)]} for c in (0, 1, 6)]
    found = sampled_passes(items)
    assert [k for k in found if not k.endswith(("low", "high"))] == [
        "sampled_pass1", "sampled_pass2", "sampled_pass4", "sampled_pass6",
    ]  # fmt: skip
    assert found["sampled_pass1"] == pytest.approx((0 + 1 / 6 + 1) / 3)
    assert found["sampled_pass6"] == pytest.approx(2 / 3)
    for k in (1, 2, 4, 6):
        name = f"sampled_pass{k}"
        assert (found[f"{name}_low"], found[f"{name}_high"]) == interval(found[name], 3)
