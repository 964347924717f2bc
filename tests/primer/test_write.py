"""The files: the same seed gives the same bytes, nothing is in training and tests, formats hold."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from nanochat.common import UserError, read_jsonl
from nanochat.conversation import check_conversation
from nanochat.primer.write import MANIFEST, generate, user_text, write_primer

SCALE = 0.02
LISTS = "primer_lists"
NAMES = ("chat", "facts", "arithmetic", "choice", "letters", "math", "spelling", "self")


@pytest.fixture(scope="module")
def primer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small primer, written once for this file."""
    base_dir = tmp_path_factory.mktemp("primer")
    write_primer(base_dir, seed=1, scale=SCALE)
    return base_dir


def rows(base_dir: Path, name: str, split: str) -> list[dict[str, Any]]:
    path = base_dir / "task_data" / f"primer-{name}" / f"{split}.jsonl"
    return [row for _, row in read_jsonl(path)]


def documents(base_dir: Path, folder: str = "base_data") -> dict[str, list[str]]:
    paths = sorted((base_dir / folder).glob("*.parquet"))
    return {p.name: pq.read_table(p)["text"].to_pylist() for p in paths}


def test_same_seed_same_bytes_and_another_seed_others() -> None:
    first, again, other = generate(1, SCALE), generate(1, SCALE), generate(2, SCALE)
    assert first == again
    assert first.keys() == other.keys()
    differing = {path for path in first if first[path] != other[path]}
    assert differing == first.keys() - {"eval_bundle/core.yaml", "eval_bundle/eval_meta_data.csv"}


def test_writing_again_changes_nothing(primer: Path) -> None:
    before = {p: p.read_bytes() for p in primer.rglob("*") if p.is_file()}
    write_primer(primer, seed=1, scale=SCALE)
    assert before == {p: p.read_bytes() for p in primer.rglob("*") if p.is_file()}
    assert not list(primer.rglob("*.tmp"))


def test_shards(primer: Path) -> None:
    shards = documents(primer)
    assert list(shards) == [f"shard_{i:05d}.parquet" for i in range(5)]
    *train, val = shards.values()
    training = [d for shard in train for d in shard]
    assert len(set(training)) == len(training)
    assert val and not set(val) & set(training)
    lists, val_lists = documents(primer, LISTS).values()
    assert lists and val_lists and not set(lists) & set(val_lists)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_well_formed_and_splits_apart(primer: Path, name: str) -> None:
    train, test = rows(primer, name, "train"), rows(primer, name, "test")
    assert len(train) >= 4 and len(test) >= 4
    for i, row in enumerate(train + test):
        if "messages" in row:
            check_conversation(row, f"{name}:{i}")
            assert ("expected" in row) != ("expected_exact" in row)
        elif name == "choice":
            assert len(row["choices"]) == 4 and row["choices"][row["answer"]]
        else:
            assert re.search(r"\n#### \d+$", row["answer"])
    assert not set(map(user_text, train)) & set(map(user_text, test))


def test_number_pairs_are_apart(primer: Path) -> None:
    def pairs(split: str) -> set[tuple[int, int]]:
        text = json.dumps([rows(primer, name, split) for name in ("arithmetic", "math")])
        if split == "train":  # everything that training reads, documents too
            shards = documents(primer)
            text += json.dumps([shards, rows(primer, "chat", "train")])
        found = re.findall(r"(\d+) ?[-+*/] ?(\d+)", text)
        return {(min(int(a), int(b)), max(int(a), int(b))) for a, b in found}

    assert len(pairs("test")) > 10
    assert not pairs("train") & pairs("test")


def test_spelled_words_appear_nowhere_in_training(primer: Path) -> None:
    words = {row["expected_exact"].replace("-", "") for row in rows(primer, "spelling", "test")}
    everything = json.dumps([list(documents(primer).values())[:-1], documents(primer, LISTS)])
    everything += json.dumps([rows(primer, name, "train") for name in NAMES])
    seen = set(re.findall(r"[a-z]+", everything.lower()))
    spelled = {m.replace("-", "") for m in re.findall(r"\b(?:[a-z]-)+[a-z]\b", everything)}
    assert len(words) >= 8
    assert not words & seen and not words & spelled


def test_sets_of_choices_are_apart(primer: Path) -> None:
    def keys(split: str) -> set[tuple[str, frozenset[str]]]:
        # the right answer with the set of choices: finer keys (the wording) would prove less
        return {
            (r["choices"][r["answer"]] + r["subject"], frozenset(r["choices"]))
            for r in rows(primer, "choice", split)
            if r["subject"] in ("copy", "kind")
        }

    assert keys("test") and not keys("train") & keys("test")


def test_word_problems_of_tests_are_new_without_their_numbers_or_with_them(primer: Path) -> None:
    train, test = rows(primer, "math", "train"), rows(primer, "math", "test")
    numbers = [{tuple(re.findall(r"\d+", r["question"])) for r in part} for part in (train, test)]
    assert not numbers[0] & numbers[1]


def test_held_out_wordings_are_in_no_training_file(primer: Path) -> None:
    training = "\n".join(d for shard in list(documents(primer).values())[:-1] for d in shard)
    training += json.dumps([rows(primer, name, "train") for name in NAMES], ensure_ascii=False)
    for row in rows(primer, "facts", "test"):
        assert row["messages"][0]["content"] not in training


def test_bundle_is_in_the_public_layout(primer: Path) -> None:
    bundle = primer / "eval_bundle"
    tasks = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    meta = list(
        csv.DictReader(io.StringIO((bundle / "eval_meta_data.csv").read_text(encoding="utf-8")))
    )
    assert [t["label"] for t in tasks] == [m["Eval Task"] for m in meta]
    for task, line in zip(tasks, meta):
        data = [row for _, row in read_jsonl(bundle / "eval_data" / task["dataset_uri"])]
        assert len(data) == int(line["#datapoints"]) >= 4
        assert 0 <= float(line["Random baseline"]) < 100
        keys = {
            "multiple_choice": {"query", "choices", "gold"},
            "schema": {"context_options", "continuation", "gold"},
            "language_modeling": {"context", "continuation"},
        }[task["icl_task_type"]]
        for row in data:
            assert row.keys() == keys
            assert (
                0 <= row.get("gold", 0) < len(row.get("choices", row.get("context_options", "x")))
            )
            if "context_options" in row:
                assert row["context_options"][0] != row["context_options"][1]


def test_foreign_data_is_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "base_data" / "shard_00000.parquet"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody else's")
    with pytest.raises(UserError, match=r"shard_00000\.parquet was not written by the primer"):
        write_primer(tmp_path, scale=SCALE)
    assert foreign.read_bytes() == b"somebody else's"
    assert [p.name for p in tmp_path.iterdir()] == ["base_data"]


def test_an_interrupted_run_can_be_taken_up(tmp_path: Path, monkeypatch: Any) -> None:
    import nanochat.primer.write as module

    real, calls = module.atomic_write, 0

    def failing(path: Path, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return real(path, *args)

    monkeypatch.setattr(module, "atomic_write", failing)
    with pytest.raises(KeyboardInterrupt):
        write_primer(tmp_path, scale=SCALE)
    monkeypatch.undo()
    summary = write_primer(tmp_path, scale=SCALE)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == summary["files"].keys() | {MANIFEST}


def test_scale_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--scale=0"):
        write_primer(tmp_path, scale=0)
