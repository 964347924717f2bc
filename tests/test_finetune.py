"""Own data in every stage by one flag: what is trained on, what is held out, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from nanochat.checkpoint import list_steps, read_meta, step_dir
from nanochat.common import UserError
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, RL_FLAGS, make_world, run_stage

STEPS = ["--num_iterations=2", "--device_batch_size=2", "--device_type=cpu"]
CHAT_FLAGS = [*STEPS, "--total_batch_size=256", "--sample_prompts=Hello!"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer, a base and a mid model of 2 steps (tag d2)."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        make_world(folder)
        run_stage("base_train", *BASE_FLAGS, "--num_iterations=2")
        run_stage("mid_train", *MID_FLAGS, "--num_iterations=2")
    return folder


@pytest.fixture(autouse=True)
def base(world: Path, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    return world


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path)) as f:  # packed as the name says
        for row in rows:
            f.write((json.dumps(row) + "\n").encode())
    return str(path)


def chats(count: int, word: str = "own") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{word} {i}?"},
                      {"role": "assistant", "content": f"Yes, {i}."}]}
        for i in range(count)
    ]  # fmt: skip


def problems(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{i}+1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(count)
    ]


def meta_of(stage: str, tag: str) -> dict[str, Any]:
    return read_meta(step_dir(stage, tag, list_steps(stage, tag)[-1]))


def test_pretraining_on_a_folder(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl"):
        write(tmp_path / name, [{"text": f"{name} says {i}. " * 5} for i in range(60)])
    tag = "--model_tag=own"
    run_stage("base_train", *BASE_FLAGS, "--num_iterations=2", tag, f"--data={tmp_path}")
    assert meta_of("base", "own")["validation"] == "c.jsonl"
    write(tmp_path / "d.jsonl", [{"text": "later"}])
    lone = ["--num_iterations=1", "--model_tag=lone", f"--data={tmp_path / 'a.jsonl.gz'}"]
    run_stage("base_train", *BASE_FLAGS, *lone, "--max_seq_len=32")
    assert meta_of("base", "lone")["validation"] == "a.jsonl.gz: 1 document in 50, by its hash"


@pytest.mark.parametrize("stage, script", [("mid", "mid_train"), ("sft", "chat_sft")])
def test_conversations_take_the_place_of_the_mixture(
    stage: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No hub is asked: with --data alone, nothing but own data is trained on."""
    data = write(tmp_path / "chats.jsonl.zst", chats(300))
    run_stage(script, *CHAT_FLAGS, f"--data={data}", "--source_tag=d2", "--model_tag=own")
    meta = meta_of(stage, "own")
    assert meta["mixture"] == data
    assert meta["validation"] == "chats.jsonl.zst: 1 document in 50, by its hash"
    assert meta["metrics"]["val_loss"] > 0
    assert len([row for row in capsys.readouterr().out.splitlines() if "100.0%" in row]) == 1
    both = ["--mixture=primer-facts@50", "--val_mixture=primer-facts@10", "--model_tag=both"]
    run_stage(script, *CHAT_FLAGS, f"--data={data}", "--source_tag=d2", *both)
    meta = meta_of(stage, "both")
    assert meta["mixture"] == f"primer-facts@50 | {data}"
    assert meta["validation"].startswith("primer-facts@10 | chats.jsonl.zst: 1 document in 50")


def test_problems_for_rl(tmp_path: Path) -> None:
    data = write(tmp_path / "problems.jsonl", problems(200))
    rl = [*RL_FLAGS, "--num_iterations=1", "--source_tag=d2"]
    run_stage("chat_rl", *rl, f"--data={data}", "--model_tag=own")
    meta = meta_of("rl", "own")
    assert meta["validation"] == "problems.jsonl: 1 document in 50, by its hash"
    assert meta["metrics"]["problems"] <= 4  # of those held out
    run_stage("chat_rl", *rl, f"--task={data}", "--model_tag=task")  # the same, as a task
    assert meta_of("rl", "task")["validation"] == meta["validation"]
    few = write(tmp_path / "few.jsonl", problems(3)[1:])  # none to hold out: no evaluation
    run_stage("chat_rl", *rl, f"--data={few}", "--model_tag=few")
    assert "pass1" not in meta_of("rl", "few")["metrics"]


@pytest.mark.parametrize("script, argv", [("mid_train", CHAT_FLAGS), ("chat_rl", RL_FLAGS)])
def test_validation_of_nothing_is_refused(script: str, argv: list[str]) -> None:
    with pytest.raises(UserError, match="--val_data=x belongs to --data"):
        run_stage(script, *argv, "--val_data=x", "--preview")


def test_a_bad_row_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", [*chats(3), {"text": "no conversation"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:4: expected a Custom row, found columns text"):
        run_stage("mid_train", *CHAT_FLAGS, f"--data={data}", "--model_tag=bad")
    assert list_steps("mid", "bad") == []


def test_every_stage_has_a_preview_that_needs_no_gpu(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where flags ask for one; and the preview of pretraining needs no model either."""
    data = write(tmp_path / "chats.jsonl", chats(300))
    answers = write(tmp_path / "problems.jsonl", problems(200))
    stages = [
        ("tok_train", ["--preview"], ["documents of", "cropped to --doc_cap"]),
        ("base_train", [*BASE_FLAGS, "--depth=99"], ["validation: shard_00004", "dropped", "⟦"]),
        ("mid_train", [*MID_FLAGS], ["primer-facts", "share", "trained on", "dropped", "⟦"]),
        ("chat_sft", [*CHAT_FLAGS, f"--data={data}"], ["100.0%", "by its hash", "Yes, ", "⟦"]),
        ("chat_rl", [*RL_FLAGS, f"--data={answers}"], ["held out", "#### ", "⟦"]),
    ]
    before = sorted(base.glob("*_checkpoints/*/*")), (base / "tokenizer").stat().st_mtime_ns
    for name, argv, expected in stages:
        gpu = [] if name == "tok_train" or torch.cuda.is_available() else ["--device_type=cuda"]
        run_stage(name, *argv, *gpu, "--preview")
        out = capsys.readouterr().out
        assert [text for text in expected if text not in out] == [], name
    after = sorted(base.glob("*_checkpoints/*/*")), (base / "tokenizer").stat().st_mtime_ns
    assert after == before
