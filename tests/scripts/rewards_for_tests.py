"""Rewards for runs in processes of their own, which know the repository's modules only."""

from __future__ import annotations

from typing import Any


def letters(problem: Any, reply: str) -> int:
    """Something that a model of a few steps earns, too."""
    return len(reply)


def some(problem: Any, reply: str) -> int:
    """The same, but nothing to learn from about half of the problems."""
    return len(reply) if len(problem["expected"]) == 2 else 1
