"""
Is a score more than a habit? Two yardsticks beside chance, from the answers alone, without another
pass through the model. Floor 4.

    control    what the same answers would score on other questions: the mean over all pairings of
               an answer with another question's key. A model that always says A gets here what it
               gets for real.
    majority   what the one answer that is right most often would score.

A score that is not above both says nothing about what the model knows (karpathy/nanochat#806).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def shuffled_accuracy(answers: Sequence[Hashable], keys: Sequence[Hashable]) -> float:
    """Expected share of answers that equal their key when the keys are shuffled; 0 to 1.

    Exact, so no seed: the probability that a random answer equals a random key. None as an answer
    equals no key."""
    count = Counter(keys)
    return sum(count[a] for a in answers if a is not None) / max(1, len(answers) * len(keys))


def majority_accuracy(keys: Sequence[Hashable]) -> float:
    """Share of the commonest key, 0 to 1."""
    return max(Counter(keys).values(), default=0) / max(1, len(keys))
