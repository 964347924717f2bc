"""
Runs of the training stages: the golden curve, resuming, two ranks, signals.

A resumed run must be bitwise the run that was never stopped: the same rows, losses and weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat.checkpoint import list_steps, load_model, step_dir
from nanochat.common import UserError, get_base_dir
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, REPO, RL_FLAGS, make_world, run_stage, torchrun

GOLDEN = Path(__file__).parent / "golden_loss.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer, a base and a mid model of 6 steps (tag d2)."""
    folder = tmp_path_factory.mktemp("world")
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    try:
        make_world(folder)
        run_stage("base_train", *BASE_FLAGS)
        run_stage("mid_train", *MID_FLAGS)
    finally:
        if before is None:
            del os.environ["NANOCHAT_BASE_DIR"]
        else:
            os.environ["NANOCHAT_BASE_DIR"] = before
    return folder


@pytest.fixture
def base(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared world as the base directory of this test; runs use tags of their own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    return world


def losses(stage: str, tag: str) -> list[float]:
    """The logged loss of every step; of a step logged twice, the last."""
    path = get_base_dir() / "report" / f"train_{stage}_{tag}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if row["event"] == "step"}
    return [by_step[k] for k in sorted(by_step)]


def weights(stage: str, tag: str, step: int) -> dict[str, torch.Tensor]:
    folder = step_dir(stage, tag, step)
    both = {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}
    assert both
    return both


def assert_bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
def test_golden_curve(base: Path, arch: str) -> None:
    """20 steps on the CPU give the losses on file. A change of numbers must be meant: then run

    python -m tests.test_train, and say in the commit why the curve moved."""
    run_stage("base_train", *golden_flags(arch))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[arch]
    assert losses("base", f"golden-{arch}") == pytest.approx(golden, rel=2e-4)
    assert golden[-1] < 0.8 * golden[0]  # and it learns


def golden_flags(arch: str) -> list[str]:
    return [*BASE_FLAGS, "--num_iterations=20", f"--model_tag=golden-{arch}", f"--arch={arch}"]


STAGES = [("base", "base_train", BASE_FLAGS, 6), ("mid", "mid_train", MID_FLAGS, 6),
          ("sft", "chat_sft", [*MID_FLAGS, "--total_batch_size=256"], 6),
          ("rl", "chat_rl", RL_FLAGS, 4)]  # fmt: skip


@pytest.mark.parametrize("stage, script, argv, steps", STAGES)
def test_resume_is_bitwise(
    base: Path, stage: str, script: str, argv: list[str], steps: int
) -> None:
    """Half the run, a resume, the other half: the same as in one go. Twice in a row."""
    third = steps // 3
    source = [] if stage == "base" else ["--source_tag=d2"]
    argv = [*argv, *source, "--eval_every=2", f"--save_every={third}", "--keep_last=-1"]
    run_stage(script, *argv, "--model_tag=whole")
    run_stage(script, *argv, "--model_tag=cut")
    for first in (third, 2 * third):
        for step in list_steps(stage, "cut"):
            if step > first:
                shutil.rmtree(step_dir(stage, "cut", step))
        run_stage(script, *argv, "--model_tag=cut", "--resume")
    assert list_steps(stage, "cut") == list_steps(stage, "whole")
    assert losses(stage, "cut") == losses(stage, "whole")
    assert_bitwise(weights(stage, "cut", steps), weights(stage, "whole", steps))


def test_resume_refuses_what_differs(base: Path) -> None:
    argv = [*BASE_FLAGS, "--model_tag=strict", "--save_every=3"]
    run_stage("base_train", *argv)
    for flag, named in [("--seed=7", "--seed"), ("--depth=3", "shape"),
                        ("--total_batch_size=128", "--total_batch_size"),
                        ("--num_iterations=9", "number of steps")]:  # fmt: skip
        with pytest.raises(UserError, match=named):
            run_stage("base_train", *argv, flag, "--resume_from_step=3")


def test_accumulation_does_not_matter(base: Path) -> None:
    """One micro-batch of 4 rows or four of 1: the same losses to float tolerance."""
    for size in (1, 4):
        flags = [*BASE_FLAGS, f"--device_batch_size={size}", f"--model_tag=accumulate{size}"]
        run_stage("base_train", *flags)
    assert losses("base", "accumulate1") == pytest.approx(losses("base", "accumulate4"), rel=1e-4)


def test_pretraining_goes_on_from_a_base_model(base: Path) -> None:
    argv = [*BASE_FLAGS, "--source_tag=d2", "--model_tag=longer", "--max_seq_len=128"]
    still = ["--num_iterations=1", "--embedding_lr=0", "--unembedding_lr=0", "--matrix_lr=0"]
    run_stage("base_train", *argv, *still)
    longer, _, _ = load_model("base", "cpu", "longer")
    assert longer.config.sequence_len == 128
    for name, weight in load_model("base", "cpu", "d2")[0].state_dict().items():
        assert torch.equal(longer.state_dict()[name], weight), name
    with pytest.raises(UserError, match=r"--source_tag=d2: .* --depth"):
        run_stage("base_train", *argv, "--depth=3")


@pytest.mark.slow
@pytest.mark.parametrize("stage, script, argv, steps", STAGES)
def test_two_ranks_equal_one(
    base: Path, stage: str, script: str, argv: list[str], steps: int
) -> None:
    """Under torchrun with two gloo ranks: the same rows, and the same losses as one process."""
    source = [] if stage == "base" else ["--source_tag=d2"]
    argv = [*argv, *source, "--device_batch_size=1"]
    run_stage(script, *argv, "--model_tag=one")
    done = torchrun(2, script, *argv, "--model_tag=two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(stage, "two") == pytest.approx(losses(stage, "one"), rel=1e-3, abs=1e-5)
    one, two = weights(stage, "one", steps), weights(stage, "two", steps)
    assert one.keys() == two.keys()
    # What two ranks saved, one rank resumes.
    run_stage(script, *argv, "--model_tag=two", "--resume")


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(base: Path) -> None:
    command = [sys.executable, "-m", "scripts.base_train", *BASE_FLAGS,
               "--num_iterations=100000", "--model_tag=stopped", "--eval_every=-1"]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "base step 3/" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert "--resume" in rest
    (step,) = list_steps("base", "stopped")
    assert step >= 3
    load_model("base", "cpu", "stopped", step)


def test_preview_trains_nothing(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage("base_train", *BASE_FLAGS, "--model_tag=preview", "--preview")
    run_stage("mid_train", *MID_FLAGS, "--model_tag=preview", "--source_tag=d2", "--preview")
    out = capsys.readouterr().out
    assert "row 0" in out and "%" in out
    assert list_steps("base", "preview") == list_steps("mid", "preview") == []


def test_checkpoint_of_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    """Training a new tokenizer under an old model must not go unnoticed."""
    from nanochat.tokenizer import Tokenizer

    kept = tmp_path / "kept"
    shutil.copytree(base / "tokenizer", kept)
    try:
        Tokenizer.train(["another text altogether " * 50], 300).save(base / "tokenizer")
        with pytest.raises(UserError, match="another tokenizer"):
            load_model("base", "cpu", "d2")
    finally:
        shutil.rmtree(base / "tokenizer")
        shutil.copytree(kept, base / "tokenizer")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        make_world(Path(folder))
        curves = {}
        for name in ("gpt", "qwen2.5"):
            run_stage("base_train", *golden_flags(name))
            curves[name] = losses("base", f"golden-{name}")
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
