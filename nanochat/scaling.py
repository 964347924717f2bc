"""
Scaling laws fitted to a few runs, with what so few points leave open.

Loss falls with compute as  E + A C^-alpha  (Hoffmann et al., arXiv 2203.15556, who have it in
parameters and tokens). At a fixed number of FLOPs the best size is the bottom of a parabola in
log N, and the best sizes of several budgets lie on a power law (their approach 2). Floor 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanochat.common import UserError

# Two-sided 95% quantiles of Student's t by degrees of freedom, from the usual table; 1.96 beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ALPHAS = np.geomspace(0.005, 2.0, 1200)  # language models have 0.05 to 0.5


def t95(degrees: int) -> float:
    """Half the width of a 95% interval in standard errors, for so many degrees of freedom."""
    return T95[degrees - 1] if degrees <= len(T95) else 1.96


Interval = tuple[float, float]


@dataclass
class PowerLaw:
    """y = E + A (x / x0)^-alpha. Intervals are 95%; None where the points do not give one."""

    E: float
    A: float
    alpha: float
    x0: float  # geometric mean of the x: A is then of the size of what is measured
    rms: float  # of the residuals
    alpha_interval: Interval | None = None
    E_interval: Interval | None = None
    note: str = ""  # what the points do not determine
    # (E, A, alpha) of every law within the interval, for the band of a drawing
    family: list[tuple[float, float, float]] = field(default_factory=list, repr=False)

    def __call__(self, x: float | np.ndarray) -> np.ndarray:
        """The law at x."""
        return _law(self.E, self.A, self.alpha, np.asarray(x, dtype=float) / self.x0)

    def band(self, x: float | np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(lowest, highest) of the laws within the interval at x: what one may expect of a larger
        run. None without an interval."""
        if not self.family:
            return None
        ratio = np.asarray(x, dtype=float) / self.x0
        values = np.array([_law(*law, ratio) for law in self.family])
        return values.min(axis=0), values.max(axis=0)


def _law(E: float, A: float, alpha: float, ratio: np.ndarray) -> np.ndarray:
    return E + A * ratio**-alpha


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in y, of points of which y falls with x; E >= 0.

    For a given alpha the law is linear in E and A, so only alpha is searched. The interval holds
    every alpha whose squared error is not significantly above the least (profile likelihood). Two
    points determine no E (it is 0 then), three leave nothing to judge the fit by."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    order = np.argsort(xs, kind="stable")
    xs, ys = xs[order], ys[order]
    if len(np.unique(xs)) < 2:
        raise UserError(f"a scaling law needs runs of 2 or more sizes, not of {len(np.unique(xs))}")
    if ys[-1] >= ys[0]:
        raise UserError(
            f"no scaling law: the loss does not fall, from {ys[0]:.4f} at {xs[0]:.3g} to "
            f"{ys[-1]:.4f} at {xs[-1]:.3g}"
        )
    x0 = float(np.exp(np.log(xs).mean()))
    ratio = xs / x0
    if len(np.unique(xs)) == 2:
        slope, level = np.polyfit(np.log(ratio), np.log(ys), 1)
        law = PowerLaw(0.0, float(np.exp(level)), -float(slope), x0, 0.0)
        law.rms = _rms(law, xs, ys)
        law.note = "two sizes only: E is taken to be 0, and alpha has no interval"
        return law
    fits = [_linear(ratio, ys, alpha) for alpha in ALPHAS]
    best = int(np.argmin([error for error, _, _ in fits]))
    alphas = np.linspace(ALPHAS[max(0, best - 1)], ALPHAS[min(best + 1, len(ALPHAS) - 1)], 401)
    finer = [_linear(ratio, ys, alpha) for alpha in alphas]
    least, E, A = min(finer)
    alpha = float(alphas[int(np.argmin([error for error, _, _ in finer]))])
    law = PowerLaw(E, A, alpha, x0, float(np.sqrt(least / len(xs))))
    degrees = len(xs) - 3
    if degrees < 1:
        law.note = "three points determine three numbers: nothing is left to judge the fit by"
        return law
    # 1e-12: points that lie on a law exactly still have rounding errors
    limit = least * (1 + t95(degrees) ** 2 / degrees) + 1e-12 * float(ys @ ys) * degrees
    within = [(*fit[1:], float(a)) for fit, a in zip(fits, ALPHAS) if fit[0] <= limit]
    law.family = [*within, (E, A, alpha)]
    accepted = [a for _, _, a in law.family]
    levels = [e for e, _, _ in law.family]
    law.alpha_interval = (min(accepted), max(accepted))
    law.E_interval = (min(levels), max(levels))
    if min(accepted) <= ALPHAS[0] or max(accepted) >= ALPHAS[-1]:
        law.note = "the points do not bound alpha: more sizes, further apart, would"
    return law


def _linear(ratio: np.ndarray, y: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """(squared error, E, A) of the best law with this alpha, E and A not below 0."""
    power = ratio**-alpha
    spread = power - power.mean()
    A = float(spread @ y / (spread @ spread))
    E = float(y.mean() - A * power.mean())
    if E < 0 or A < 0:  # the best within the bounds lies on one of them
        A = max(0.0, float(power @ y / (power @ power)))
        E = 0.0
    error = y - (E + A * power)
    return float(error @ error), E, A


def _rms(law: PowerLaw, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((law(x) - y) ** 2)))


# -------------------------------------------------------------------------------------------------
# IsoFLOP


@dataclass
class Optimum:
    """The best size at one budget: the bottom of a parabola through the runs of that budget."""

    flops: float
    params: float
    tokens: float
    loss: float
    curvature: float  # of the loss in ln(params), for drawing


def isoflop_optimum(
    flops: float, params: Sequence[float], tokens: Sequence[float], loss: Sequence[float]
) -> Optimum:
    """Fits loss = a (ln N - ln N*)^2 + b. UserError, with what to add, unless the bottom lies among
    the sizes that were trained: outside of them it would be a guess."""
    n, y = np.log(np.asarray(params, dtype=float)), np.asarray(loss, dtype=float)
    if len(np.unique(n)) < 3:
        raise UserError(
            f"{flops:.3g} FLOPs: a parabola needs 3 or more depths, not {len(np.unique(n))}"
        )
    middle = n.mean()  # or the powers of ln N would lose digits
    a, b, c = np.polyfit(n - middle, y, 2)
    at = middle - b / (2 * a) if a > 0 else float(n[np.argmin(y)])
    if a <= 0 or not n.min() < at < n.max():
        where = "smaller" if at <= middle else "larger"
        raise UserError(
            f"{flops:.3g} FLOPs: the best size is not among those trained; add {where} --depths"
        )
    order = np.argsort(n)
    log_tokens = np.log(np.asarray(tokens, dtype=float))
    best_tokens = np.interp(at, n[order], log_tokens[order])
    return Optimum(
        flops, float(np.exp(at)), float(np.exp(best_tokens)), float(c - b * b / (4 * a)), float(a)
    )


@dataclass
class Exponent:
    """y = level (x / x0)^exponent; the interval is 95%, None with two points."""

    exponent: float
    level: float
    x0: float
    interval: Interval | None = None

    def __call__(self, x: float | np.ndarray) -> np.ndarray:
        """The power at x."""
        return self.level * (np.asarray(x, dtype=float) / self.x0) ** self.exponent


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Exponent:
    """A straight line through the logarithms: how the best size, or data, grows with compute."""
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    if len(np.unique(log_x)) < 2:
        raise UserError("an exponent needs the best size at 2 or more budgets of --target_flops")
    middle = log_x.mean()
    slope, level = np.polyfit(log_x - middle, log_y, 1)
    law = Exponent(float(slope), float(np.exp(level)), float(np.exp(middle)))
    degrees = len(log_x) - 2
    if degrees >= 1:
        error = log_y - (level + slope * (log_x - middle))
        spread = np.sum((log_x - middle) ** 2)
        half = t95(degrees) * float(np.sqrt(error @ error / degrees / spread))
        law.interval = (law.exponent - half, law.exponent + half)
    return law
