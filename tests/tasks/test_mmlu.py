"""MMLU's two sets and the places they may lie in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nanochat.tasks.common import get_task, read_rows
from nanochat.tasks.mmlu import MMLU
from tests.tasks.data_for_tests import shared, write_jsonl, write_parquet

ROW = {"question": "2+2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1}


def test_conversation(base_dir: Path) -> None:
    write_parquet(base_dir / "task_data/mmlu/test-00000-of-00001.parquet", [ROW])
    conversation = get_task("mmlu", "test")[0]
    assert conversation["expected"] == "B"
    assert conversation["subject"] == "sums"
    assert conversation["messages"][0]["content"].startswith("2+2?\n- 3=A\n- 4=B\n")


@pytest.mark.parametrize(
    "place", ["mmlu/auxiliary_train-00000-of-00001.parquet", "mmlu/all/auxiliary_train.parquet",
              "mmlu-aux/train.parquet"]
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_auxiliary(place: str, nested: bool, base_dir: Path) -> None:
    write_parquet(base_dir / "task_data" / place, [{"train": ROW} if nested else ROW])
    task = get_task("mmlu-aux", "train")
    assert task.eval_type == "categorical"
    assert task[0]["messages"][1]["content"] == "B"


def test_subject_may_be_missing(base_dir: Path) -> None:
    write_jsonl(base_dir / "task_data/mmlu/dev.jsonl", [{k: ROW[k] for k in ROW if k != "subject"}])
    assert get_task("mmlu", "dev")[0]["subject"] == ""


def test_the_real_questions_are_of_57_subjects() -> None:
    task = MMLU(read_rows([shared("mmlu_arc") / "mmlu" / "test-00000-of-00001.parquet"]))
    subjects = Counter(task[i]["subject"] for i in range(len(task)))
    assert len(subjects) == 57 and min(subjects.values()) >= 100
    assert subjects["abstract_algebra"] == 100 and sum(subjects.values()) == 14_042
