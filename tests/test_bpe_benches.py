"""bench/bpe_*.py: the table is what was measured, and a difference in ids or merges is noticed."""

import copy
import json
import os
from pathlib import Path

import pytest

import rustbpe
from bench import bpe_encoding, bpe_table, bpe_training, render
from bench.bpe_common import Run, describe, read_texts
from nanochat.common import UserError
from nanochat.dataset import iter_texts

NO_RUNS = not hasattr(os, "sched_setaffinity") or not hasattr(rustbpe, "Encoder")
needs_runs = pytest.mark.skipif(NO_RUNS, reason="needs Linux, and our rustbpe instead of 0.1.0")
WORDS = "the cat sat on the mat and it's 12345 years old \n\n"


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"{WORDS * 20}naïve {i % 7} 東京"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_table_follows_the_results() -> None:
    names = ("bpe_training_50mb", "bpe_training", "bpe_encoding")
    results = [render.load(name) for name in names]
    before = bpe_table.passage(*results)
    changed = copy.deepcopy(results)
    changed[1]["trainers"][-1]["seconds"] = 1234.5
    row = bpe_table.find(changed[2]["encoders"], package="tiktoken", threads=2, pattern="ours")
    assert row is not None
    row["mb_per_s"] = 98765
    after = bpe_table.passage(*changed)
    for number in ("1234.5 s", "| 98765 |"):
        assert number in after and number not in before


def test_texts_are_read_up_to_the_limit_and_described(data: str) -> None:
    whole = list(iter_texts([Path(data)]))
    texts = read_texts(data, 1500)
    assert sum(map(len, texts)) == 1500
    assert texts[0] == whole[0] and texts[-1] == whole[len(texts) - 1][: len(texts[-1])]
    about = describe(["aé", "b", "aé"], "letters")
    assert about["documents"] == 3 and about["chars"] == 5
    assert (about["mb"], about["repeated_mb"]) == (0.0, 0.0)  # of 7 bytes, 3 are there twice


@needs_runs
def test_training_without_peers(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bpe_training.main(
        bpe_training.Args(data=data, vocab_size=300, repeats=1, check_docs=5, out=str(out))
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [row["texts"] for row in result["trainers"]] == ["str", "array", "str"]
    assert all(row["same_merges"] and row["seconds"] > 0 for row in result["trainers"])
    assert result["trainers"][0]["runs"][0]["tiktoken_docs"] == 5


@needs_runs
def test_encoding_without_peers(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bpe_encoding.main(bpe_encoding.Args(data=data, vocab_size=300, repeats=1, out=str(out)))
    rows = json.loads(out.read_text(encoding="utf-8"))["encoders"]
    assert {row["package"] for row in rows} == {"rustbpe", "tiktoken"}
    assert len({row["runs"][0]["ids_sha256"] for row in rows if row["pattern"] == "ours"}) == 1


def test_other_ids_or_merges_are_an_error() -> None:
    ours, peer = Run("rustbpe", "str", 2), Run("tiktoken", "str", 1)
    cl100k = {Run("rustbpe", "str", 2, "cl100k"): [{"ids_sha256": "c"}]}
    bpe_encoding.check({ours: [{"ids_sha256": "a"}], peer: [{"ids_sha256": "a"}], **cl100k})
    with pytest.raises(UserError, match="ours pattern the ids differ"):
        bpe_encoding.check({ours: [{"ids_sha256": "a"}], peer: [{"ids_sha256": "b"}], **cl100k})

    old = Run("rustbpe 0.1.0", "str", 2)
    found = {
        ours: [{"version": "0.2.0", "merges_sha256": "a"}],
        old: [{"version": "0.1.0", "merges_sha256": "a"}],
    }
    bpe_training.check(found)
    with pytest.raises(UserError, match="different merges"):
        bpe_training.check({**found, old: [{"version": "0.1.0", "merges_sha256": "b"}]})
    with pytest.raises(UserError, match=r"not 0\.1\.0"):
        bpe_training.check({**found, old: [{"version": "0.2.0", "merges_sha256": "a"}]})
    wrong = {"version": "0.2.0", "merges_sha256": "a", "tiktoken_mismatches": 1, "tiktoken_docs": 2}
    with pytest.raises(UserError, match="1 of 2 documents"):
        bpe_training.check({**found, ours: [wrong]})
