"""chat_eval as one runs it: flags, rows in the report, the table, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import UserError, read_jsonl
from nanochat.evals.chat import EvalResult
from nanochat.tasks.common import REGISTRY, get_task
from scripts import chat_eval
from scripts.chat_eval import CHATCORE, Args, chatcore_metric, chatcore_stderr
from tests.scripts.checkpoints_for_tests import save_tiny
from tests.tiny_world import torchrun

CHOICES = [{"question": f"q{i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(12)]
CHAT = [
    {"messages": [{"role": "user", "content": f"Say {i}"}], "expected": str(i)} for i in range(5)
]
FLAGS = ["-i", "sft", "-a", "pick|talk", "-m", "6", "-b", "4", "--device-type=cpu"]


@pytest.fixture
def base(own_base_dir: Path) -> Path:
    save_tiny(own_base_dir, "sft")
    for name, rows in (("pick", CHOICES), ("talk", CHAT)):
        path = own_base_dir / "task_data" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return own_base_dir


def run(*argv: str) -> None:
    chat_eval.main(flags.parse(Args, argv))


def rows_of(base: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(base / "report" / "chat_eval.jsonl")]


def test_rows_items_and_table(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*FLAGS)
    pick, talk = rows_of(base)
    assert (pick["source"], pick["model_tag"], pick["step"]) == ("sft", "tiny", 7)
    assert (pick["task"], pick["n"], pick["ended"]) == ("pick", 12, None)
    assert pick["chance"] == pytest.approx(1 / 3)
    assert 0 <= pick["accuracy"] <= 1
    assert (talk["task"], talk["n"], talk["chance"]) == ("talk", 5, 0.0)
    assert 0 <= talk["ended"] <= 1
    items = base / "report" / "chat_eval" / "sft_tiny_7_pick.jsonl"
    assert [item["index"] for _, item in read_jsonl(items)] == list(range(12))
    said = capsys.readouterr().out
    assert "accuracy %" in said
    assert "33.3" in said
    assert "control %" in said
    assert base / pick["items"] == items and str(items) in said.replace("\n", "")
    first = next(read_jsonl(items))[1]
    assert {"prompt", "reply", "gold", "correct"} <= set(first)
    assert 0 <= pick["control"] <= 1 and 0 <= talk["control"] <= 1
    run(*FLAGS, "-x", "3", "-n", "2", "-t", "1", "-k", "0")
    assert [row["n"] for row in rows_of(base)] == [12, 5, 3, 3]


@pytest.mark.slow
def test_two_ranks_find_the_same(base: Path) -> None:
    run(*FLAGS)
    done = torchrun(2, "chat_eval", *FLAGS)
    assert done.returncode == 0, done.stderr
    one, two = rows_of(base)[:2], rows_of(base)[2:]
    assert one == two


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-a", "pick|nope"], "no task 'nope'"),
        (["-a", " | "], "names no task"),
        (["-b", "0"], "--batch_size=0 must be at least 1"),
        (["-g", "other"], "other"),
        (["-i", "rl"], "rl"),
    ],
)
def test_errors_name_the_value(argv: list[str], message: str, base: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(*FLAGS, *argv)
    assert not (base / "report" / "chat_eval.jsonl").exists()


def test_chatcore_needs_all_six() -> None:
    results = [EvalResult(name, 0.5, 10, 0.1, 0.25, None) for name in CHATCORE]
    assert chatcore_metric(results) == pytest.approx(1 / 3)
    assert chatcore_metric(results[1:]) is None
    wanted = (6 * (0.1 / 0.75) ** 2) ** 0.5 / 6
    assert chatcore_stderr([*results, EvalResult("own", 0.5, 10, 9.0, 0.0, None)]) == (
        pytest.approx(wanted)
    )


def test_names_as_others_write_them() -> None:
    """karpathy/nanochat's users type them so."""
    names = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    assert [name.lower() for name in names] == list(CHATCORE)
    assert set(CHATCORE) <= set(REGISTRY)
    results = [EvalResult(name, 0.5, 10, 0.1, 0.25, None) for name in names]
    assert chatcore_metric(results) == pytest.approx(1 / 3)
    assert get_task("SpellingBee", "test", size=3).name == "spellingbee"


def test_a_weak_sandbox_must_be_asked_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(chat_eval, "allow_weak_sandbox", asked.append)
    run(*FLAGS, "-a", "pick")
    run(*FLAGS, "-a", "pick", "--weak_sandbox")
    assert asked == [False, True]
