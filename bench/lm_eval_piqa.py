"""
PIQA in lm-eval's own words: the part of bench/lm_eval_scores.py that is about a task's format.

lm-eval's piqa.yaml, from the package, with our rows in place of the data set: it writes the
prompts by itself, and ours are CORE's. The rows (bench/piqa_rows.jsonl: goal, sol1, sol2, label,
the columns of the published set) are everyday knowledge in this project's words; they show that two
programs make the same of a row, and nothing about a model.

CORE's form of a row is what its bundle holds of PIQA: "Question: GOAL" and the two solutions, with
"\\nAnswer: " between.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import read_jsonl
from nanochat.evals.core import CoreTask, Item

ROWS = Path(__file__).with_name("piqa_rows.jsonl")
NAME = "piqa_of_lm_eval"


def read_rows() -> list[Item]:
    """The rows, as PIQA has them."""
    return [row for _, row in read_jsonl(ROWS)]


def core_item(row: Item) -> Item:
    """A row of PIQA as CORE's bundle holds it."""
    return {
        "query": f"Question: {row['goal']}",
        "choices": [row["sol1"], row["sol2"]],
        "gold": row["label"],
    }


def piqa_task(folder: Path) -> CoreTask:
    """The rows as a task of CORE, with the settings that CORE's bundle has for it. Writes them to
    `folder`."""
    path = folder / "piqa.jsonl"
    lines = [json.dumps(core_item(row)) + "\n" for row in read_rows()]
    path.write_text("".join(lines), encoding="utf-8")
    return CoreTask("piqa", "multiple_choice", path, 10, "\nAnswer: ", 50.0)


def write_piqa(folder: Path, indices: Sequence[int]) -> dict[str, str]:
    """The rows of those numbers for the worker; what it must be told of them."""
    rows, path = read_rows(), folder / f"{NAME}.jsonl"
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in indices), encoding="utf-8")
    return {"task": "piqa", "name": NAME, "rows": str(path)}


def compare_piqa(
    ours: Sequence[Item], metrics: dict[str, float], found: dict[str, Any]
) -> dict[str, Any]:
    """The agreement. `ours` and `metrics`: our rows without examples and what they come to;
    `found`: the worker's result for the task. Where the white space before an answer belongs is
    told by the tokens: lm-eval says it with the answer, we with the question."""
    theirs = found["rows"]
    texts = [[["".join(pair) for pair in row["pairs"]] for row in rows] for rows in (ours, theirs)]
    diffs = [abs(x - y) for a, b in zip(ours, theirs) for x, y in zip(a["lls"], b["lls"])]
    answers = [[row["lls"].index(max(row["lls"])) for row in rows] for rows in (ours, theirs)]
    return {
        "rows": len(ours),
        "max_diff": max(diffs),
        "other_texts": sum(a != b for a, b in zip(*texts)),
        "other_tokens": sum(
            (a["ids"], a["starts"]) != (b["ids"], b["starts"]) for a, b in zip(ours, theirs)
        ),
        "other_greedy": sum(a["greedy"] != b["greedy"] for a, b in zip(ours, theirs)),
        "other_predictions": sum(a != b for a, b in zip(*answers)),
        "metrics": {"ours": metrics, "lm_eval": found["metrics"]},
    }
