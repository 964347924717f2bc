"""The vocabulary: what it must be, and what decides that an id is another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary, merge_pair
from tests.tokenizers_for_tests import tiny_tokenizer

ROOT = Path(__file__).parent.parent


def test_the_split_pattern_is_written_once() -> None:
    assert SPLIT_PATTERN == (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    sources = [*(ROOT / "nanochat").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    sources += (ROOT / "rustbpe" / "src").rglob("*.rs")
    having = [p.name for p in sources if r"\p{N}{1,2}" in p.read_text(encoding="utf-8")]
    assert having == ["vocabulary.py"]


def test_special_tokens_have_the_highest_ids_in_order() -> None:
    assert (
        *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
        *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
    ) == SPECIAL_TOKENS
    vocabulary = tiny_tokenizer(400).vocabulary
    assert vocabulary.size == 400
    assert [vocabulary.specials[name] for name in SPECIAL_TOKENS] == list(range(391, 400))


def test_merge_pair_undoes_the_last_merge() -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc", b"abcabc"]
    ranks = {token: i for i, token in enumerate(tokens)}
    assert merge_pair(b"ab", ranks) == (b"a", b"b")
    assert merge_pair(b"abc", ranks) == (b"ab", b"c")  # not (a, bc): ab was learned before bc
    assert merge_pair(b"abcabc", ranks) == (b"abc", b"abc")


def test_some_tokens_are_made_by_no_merge() -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"bc", b"xyz", b"ab", b"abcd", b"bcde"]
    ranks = {token: i for i, token in enumerate(tokens)}
    assert merge_pair(b"xyz", ranks) is None
    assert merge_pair(b"abcd", ranks) is None  # a, bc, d: neither a+bc nor bc+d is a token
    spelled = {token.decode("latin-1"): rank for token, rank in ranks.items()}
    assert merge_pair("ab", spelled) == ("a", "b")
    assert merge_pair("bcde", spelled) is None


def test_the_same_bytes_learned_twice_are_kept_once() -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"ab", b"abd"]
    vocabulary = Vocabulary.from_merges(tokens)
    assert vocabulary.size == 259 + len(SPECIAL_TOKENS)
    assert vocabulary.ranks[b"abd"] == 258


def test_fingerprint_changes_with_anything_that_decides_an_id() -> None:
    vocabulary = tiny_tokenizer().vocabulary
    base = vocabulary.fingerprint()
    assert Vocabulary(**vars(vocabulary)).fingerprint() == base
    tokens = sorted(vocabulary.ranks, key=vocabulary.ranks.__getitem__)
    tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    names = list(vocabulary.specials)
    changes: list[dict[str, Any]] = [
        {"ranks": {token: i for i, token in enumerate(tokens)}},
        {"specials": dict(zip(reversed(names), vocabulary.specials.values()))},
        {"pattern": vocabulary.pattern.replace("{1,2}", "{1,3}")},
        {"normalization": "NFC"},
    ]
    changed = {dataclasses.replace(vocabulary, **change).fingerprint() for change in changes}
    assert len(changed | {base}) == 5
    # The order in which the tokens are listed is no part of it
    listed = dict(sorted(vocabulary.ranks.items()))
    assert dataclasses.replace(vocabulary, ranks=listed).fingerprint() == base


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: {"ranks": {t: i for i, t in enumerate(list(v.ranks)[1:])}}, "256 bytes"),
        (lambda v: {"ranks": {**v.ranks, b"new": 10_000}}, "0, 1, 2"),
        (lambda v: {"specials": {"<|bos|>": 5}}, "unique and above"),
        (lambda v: {"specials": {"a": 500, "b": 500}}, "unique and above"),
    ],
)
def test_inconsistent_vocabularies_are_refused(change: Any, told: str) -> None:
    vocabulary = tiny_tokenizer().vocabulary
    with pytest.raises(UserError, match=told):
        dataclasses.replace(vocabulary, **change(vocabulary))
