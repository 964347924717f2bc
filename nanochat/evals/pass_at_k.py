"""
pass@k: how likely one of k replies is right, estimated from n >= k replies to each problem.

The unbiased estimator of the Codex paper (arXiv 2107.03374): of n replies, c of them right, the
share of the choices of k that hold a right one. Simply counting the problems with a right reply
among k drawn has the same mean and a larger spread. Floor 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for one problem. ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right replies among {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """A 95% confidence interval of the mean of n numbers within [0, 1] (Wilson 1927).

    Exact in nothing but honest everywhere: it does not shrink to a point where all are 0 or all are
    1, and stays within [0, 1]. For numbers between 0 and 1 it is a little too wide: no distribution
    of that mean varies more than one of zeros and ones."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    spread = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def sampled_passes(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """pass@k with its interval for k = 1, 2, 4, ... and n, from EvalResult.items of n replies each.

    {"sampled_pass1": mean, "sampled_pass1_low": ..., "sampled_pass1_high": ..., ...}"""
    right = [sum(reply["correct"] for reply in item["replies"]) for item in items]
    n = len(items[0]["replies"])
    found: dict[str, float] = {}
    for k in sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n}):
        mean = sum(pass_at_k(n, c, k) for c in right) / len(right)
        low, high = interval(mean, len(right))
        name = f"sampled_pass{k}"
        found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return found
