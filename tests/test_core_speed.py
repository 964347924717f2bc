"""The bench of CORE's speed: both ways predict the same, and the result says so."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import core_speed
from nanochat.common import read_json
from tests.evals.fakes_for_tests import tiny_model
from tests.evals.test_core import ROWS, naive_predict, task_of, write_bundle
from tests.tokenizers_for_tests import tiny_tokenizer


def test_the_loop_is_the_slow_twin() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    for kind, items in ROWS.items():
        for i in range(len(items)):
            alone = core_speed.predict_alone(task_of(kind, 2), items, i, model, tokenizer)
            assert alone == naive_predict(task_of(kind, 2), items, i, model, tokenizer)


def test_both_ways_agree(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    tasks = [
        (task, items, list(range(len(items))))
        for task in core_speed.read_bundle(write_bundle(tmp_path))
        for items in [core_speed.read_items(task)]
    ]
    result = core_speed.compare(tasks, model, tokenizer, torch.device("cpu"))
    assert result["total"]["items"] == result["total"]["equal"] == 11
    assert set(result["tasks"]) == {f"my_{kind}" for kind in ROWS}


def test_one_command(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = core_speed.Args(
        device_type="cpu", bundle=str(write_bundle(tmp_path / "bundle")), depth=1,
        max_seq_len=64, max_per_task=2, out=str(out),
    )  # fmt: skip
    core_speed.main(args)
    result = read_json(out)
    assert result["total"]["items"] == 6
    assert result["machine"] and result["versions"]
