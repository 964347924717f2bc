"""bench/decode_speed.py, small: both engines write the same tokens, and int8 has its price."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.decode_speed import Args, compare, int8_quality, tokenizer_of


def test_both_write_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    args = Args(prompt_tokens=5, new_tokens=6, rounds=2, steps=["plain"])
    args.batches = [1, 3]
    rows = compare("qwen2.5", 1, "bfloat16", args, tokenizer_of(400), tmp_path)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["equal_tokens"] == 1.0
        rates = row["transformers_tokens_per_second"], row["ours_tokens_per_second"]
        assert row["times"] == pytest.approx(rates[1] / rates[0]) and min(rates) > 0
        assert row["most"] > 0


def test_int8_costs_something_and_not_much() -> None:
    found = int8_quality("gpt", 1, Args(quality_steps=20), tokenizer_of(400))
    assert 0.5 < found["float32_bits_per_byte"] < 8
    assert 0 < abs(found["increase"]) < 0.01
