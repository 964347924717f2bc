"""Mixtures: the one-line spec, sizes and shares, an order that is fixed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.tasks.common import get_task
from nanochat.tasks.mixture import Ingredient, TaskMixture, build_mixture, parse_mixture
from tests.tasks.data_for_tests import write_jsonl


def rows(name: str, count: int) -> list[dict]:
    turns = [("user", "{}"), ("assistant", "fine")]
    return [
        {"messages": [{"role": r, "content": t.format(f"{name} {i}")} for r, t in turns]}
        for i in range(count)
    ]


@pytest.fixture
def data(base_dir: Path) -> Path:
    for name, count in (("aa", 10), ("bb", 4)):
        write_jsonl(base_dir / f"task_data/{name}/train.jsonl", rows(name, count))
    return base_dir


def said(mixture: TaskMixture) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in mixture]


def test_parse() -> None:
    assert parse_mixture("smoltalk | mmlu-aux|gsm8k*2|spelling@2_000|x@10*3| my/file.jsonl*2") == [
        Ingredient("smoltalk"),
        Ingredient("mmlu-aux"),
        Ingredient("gsm8k", epochs=2),
        Ingredient("spelling", 2000),
        Ingredient("x", 10, 3),
        Ingredient("my/file.jsonl", epochs=2),
    ]


@pytest.mark.parametrize("spec", ["", "a||b", "a|", "a*", "a*2*3", "*2", "@3", "a*0", "a@0", "a*x"])
def test_bad_specs_are_quoted(spec: str) -> None:
    with pytest.raises(UserError, match="mixture "):
        parse_mixture(spec)


def test_rows_epochs_and_shares(data: Path) -> None:
    mixture = build_mixture("aa@6*2|bb*3")
    counts = Counter(said(mixture))
    assert len(mixture) == 24
    assert sorted(Counter(name.split()[0] for name in counts).items()) == [("aa", 6), ("bb", 4)]
    assert {n for name, n in counts.items() if name.startswith("aa")} == {2}
    assert {n for name, n in counts.items() if name.startswith("bb")} == {3}
    assert [r.share for r in mixture.rows] == [0.5, 0.5]
    table = mixture.describe().splitlines()
    assert table[1].split() == ["aa", "6", "2", "50.0%"]
    assert table[-1].split() == ["all", "24"]


def test_shares_of_tokens_and_what_is_lost(data: Path) -> None:
    mixture = build_mixture("aa|bb")
    counts = np.zeros((14, 3), dtype=np.int64)
    counts[mixture.owners == 0] = (10, 10, 5)  # each of aa's: whole, half of it trained on
    counts[mixture.owners == 1] = (30, 25, 20)  # each of bb's: cut
    counts[np.flatnonzero(mixture.owners == 1)[0]] = (30, 0, 0)  # but one, which is dropped
    lines = [line.split() for line in mixture.describe(counts).splitlines()]
    assert lines[1] == ["aa", "10", "1", "71.4%", "100", "57.1%", "50%", "0", "0"]
    assert lines[2] == ["bb", "4", "1", "28.6%", "75", "42.9%", "80%", "3", "1"]
    assert lines[3] == ["all", "14", "175", "100.0%", "63%", "3", "1"]
    assert mixture.shares(counts) == [
        {"name": "aa", "rows": 10, "epochs": 1, "tokens": 100, "trained": 50},
        {"name": "bb", "rows": 4, "epochs": 1, "tokens": 75, "trained": 60},
    ]


def test_own_rows_join_a_mixture_or_are_all_of_it(data: Path) -> None:
    own = get_task("bb", "train")
    mixture = build_mixture("aa@3", own=own)
    assert sorted(name[:2] for name in said(mixture)) == ["aa"] * 3 + ["bb"] * 4
    assert [row.name for row in mixture.rows] == ["aa", "bb"]
    assert sorted(said(build_mixture("", own=own))) == sorted(said(build_mixture("bb")))


def test_order_is_shuffled_and_fixed(data: Path) -> None:
    order = said(build_mixture("aa|bb", seed=1))
    assert order == said(build_mixture("aa|bb", seed=1))
    assert order != said(build_mixture("aa|bb", seed=-1))
    assert order != sorted(order)
    assert sorted(order) == sorted(said(build_mixture("bb|aa", seed=7)))


def test_rows_are_drawn_not_the_first(data: Path) -> None:
    taken = {name for name in said(build_mixture("aa@4")) if name.startswith("aa")}
    assert taken != {f"aa {i}" for i in range(4)}


def test_too_many_rows(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(build_mixture("bb@5")) == 4
    assert "bb@5: there are only 4 rows" in capsys.readouterr().err
    assert len(build_mixture("spelling@12345")) == 12345  # generated: as many as one likes
