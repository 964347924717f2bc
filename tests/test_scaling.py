"""Scaling laws: known exponents come back, and what few points leave open is said."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.scaling import fit_exponent, fit_power_law, isoflop_optimum, t95

C = np.geomspace(1e15, 1e19, 6)


@pytest.mark.parametrize(
    ("E", "A", "alpha"), [(0.6, 0.5, 0.15), (0.0, 1.0, 0.05), (1.7, 2.0, 0.34), (0.5, 0.1, 0.9)]
)
def test_a_law_comes_back_from_its_points(E: float, A: float, alpha: float) -> None:
    y = E + A * (C / 1e16) ** -alpha
    law = fit_power_law(C, y)
    assert law.alpha == pytest.approx(alpha, rel=2e-3)
    assert pytest.approx(E, abs=5e-3) == law.E
    assert law(C) == pytest.approx(y, rel=1e-4) and law.rms < 1e-4
    assert law(1e21) == pytest.approx(E + A * (1e5) ** -alpha, rel=5e-3)  # beyond the points
    shuffled = [3, 0, 5, 1, 4, 2]
    assert fit_power_law(C[shuffled], y[shuffled]).alpha == pytest.approx(law.alpha)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95% of the time, counted over 200 laws with noise, and not by being wide."""
    rng = np.random.default_rng(0)
    truth, hits, widths = 0.6 + 0.5 * (C / 1e16) ** -0.2, 0, []
    for _ in range(200):
        law = fit_power_law(C, truth + rng.normal(0, 0.002, len(C)))
        assert law.alpha_interval and law.E_interval
        low, high = law.alpha_interval
        assert low <= law.alpha <= high and law.E_interval[0] <= law.E <= law.E_interval[1]
        hits += low <= 0.2 <= high
        widths.append(high - low)
    assert 180 <= hits <= 199
    assert np.median(widths) < 0.1
    band = law.band(1e20)
    assert band is not None and band[0] < law(1e20) < band[1]


def test_few_points_claim_little() -> None:
    y = 0.6 + 0.5 * (C / 1e16) ** -0.2
    three = fit_power_law(C[:3], y[:3])
    assert three.alpha == pytest.approx(0.2, rel=1e-2) and three.rms < 1e-5
    assert (
        three.alpha_interval is None and three.band(1e20) is None and "three points" in three.note
    )
    two = fit_power_law(C[:2], y[:2])
    assert (two.E, two.alpha_interval) == (0.0, None) and "E is taken to be 0" in two.note
    assert two(C[:2]) == pytest.approx(y[:2])
    # Noise as large as what is to be seen
    noisy = fit_power_law(C[:4], [1.00, 0.97, 0.99, 0.96])
    assert "do not bound alpha" in noisy.note
    with pytest.raises(UserError, match="2 or more sizes, not of 1"):
        fit_power_law([1e15, 1e15], [1.0, 0.9])
    with pytest.raises(UserError, match="does not fall"):
        fit_power_law(C[:3], [1.0, 0.9, 1.1])


def test_students_t_falls_to_the_normal_quantile() -> None:
    values = [t95(n) for n in range(1, 14)]
    assert values == sorted(values, reverse=True) and values[-1] == 1.96


def test_the_bottom_of_a_parabola_in_log_size() -> None:
    params = np.array([1e7, 3e7, 1e8, 3e8])
    loss = 0.9 + 0.02 * (np.log(params) - np.log(6e7)) ** 2
    best = isoflop_optimum(6e17, params, 6e17 / (6 * params), loss)
    assert (best.params, best.loss) == (pytest.approx(6e7), pytest.approx(0.9))
    assert best.tokens == pytest.approx(6e17 / (6 * 6e7))
    assert best.curvature == pytest.approx(0.02)


def test_no_bottom_is_guessed_outside_of_what_was_trained() -> None:
    params = np.array([1e7, 3e7, 1e8])
    for optimum, advice in [(1e9, "larger"), (1e5, "smaller")]:
        loss = 0.9 + 0.02 * (np.log(params) - np.log(optimum)) ** 2
        with pytest.raises(UserError, match=f"add {advice} --depths"):
            isoflop_optimum(1e17, params, params, loss)
    with pytest.raises(UserError, match="add smaller --depths"):  # a hill has no bottom
        isoflop_optimum(1e17, params, params, [0.9, 1.0, 0.95])
    with pytest.raises(UserError, match="3 or more depths, not 2"):
        isoflop_optimum(1e17, params[:2], params[:2], [1.0, 0.9])


def test_how_the_best_size_grows() -> None:
    exact = fit_exponent(C, 7.0 * C**0.54)
    assert exact.exponent == pytest.approx(0.54)
    assert exact(1e20) == pytest.approx(7.0 * 1e20**0.54)
    assert exact.interval == pytest.approx((0.54, 0.54), abs=1e-6)
    assert fit_exponent(C[:2], 7.0 * C[:2] ** 0.54).interval is None
    rng = np.random.default_rng(1)
    noisy = fit_exponent(C, 7.0 * C**0.54 * np.exp(rng.normal(0, 0.05, len(C))))
    assert noisy.interval and noisy.interval[0] < 0.54 < noisy.interval[1]
    with pytest.raises(UserError, match="2 or more budgets"):
        fit_exponent([1e15], [1e7])
