"""
Runs of the training stages: the golden curve, what a resume refuses, two ranks.

That a resumed run is the run that was never stopped is shown in test_kill_resume.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat.checkpoint import LOG, list_steps, load_model, run_dir, stage_dir, step_dir
from nanochat.common import UserError
from nanochat.models import ARCHITECTURES
from tests.tiny_world import (
    BASE_FLAGS,
    MID_FLAGS,
    REPO,
    make_world,
    new_world,
    run_stage,
    torchrun_command,
)
from tests.tokenizers_for_tests import big_qwen, tiny_qwen

GOLDEN = Path(__file__).parent / "golden_loss.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer, a base and a mid model of 6 steps (tag d2)."""
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *BASE_FLAGS)
        run_stage("mid_train", *MID_FLAGS)
    return folder


def log_path(stage: str, tag: str) -> Path:
    return run_dir(stage, tag) / LOG


def losses(stage: str, tag: str) -> list[float]:
    """The logged loss of every step, each of which has one row."""
    lines = log_path(stage, tag).read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def weights(stage: str, tag: str, step: int) -> dict[str, torch.Tensor]:
    folder = step_dir(stage, tag, step)
    both = {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}
    return {name: tensor.clone() for name, tensor in both.items()}  # not a view of the file


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_golden_curve(base: Path, arch: str) -> None:
    """20 steps on the CPU give the losses on file. A change of numbers must be meant: then run

    python -m tests.test_train, and say in the commit why the curve moved."""
    run_stage("base_train", *golden_flags(arch))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[arch]
    assert losses("base", f"golden-{arch}") == pytest.approx(golden, rel=2e-4)
    assert golden[-1] < 0.8 * golden[0]  # and it learns


def golden_flags(arch: str) -> list[str]:
    return [*BASE_FLAGS, "--num_iterations=20", f"--model_tag=golden-{arch}", f"--arch={arch}"]


def test_resume_refuses_what_differs(base: Path) -> None:
    argv = [*BASE_FLAGS, "--model_tag=strict", "--save_every=3"]
    run_stage("base_train", *argv)
    for flag, named in [("--seed=7", "--seed"), ("--depth=3", "architecture and shape"),
                        ("--total_batch_size=128", "--total_batch_size"),
                        ("--matrix_lr=0.01", "--matrix_lr"), ("--warmup_steps=2", "--warmup_steps"),
                        ("--num_iterations=9", "--num_iterations"),
                        ("--source_tag=d2", "starting checkpoint")]:  # fmt: skip
        with pytest.raises(UserError, match=f"step_000003: .*its {named} was .*, now it is "):
            run_stage("base_train", *argv, flag, "--resume_from_step=3")
    other = base / "other.jsonl"  # enough for a row of validation: 1 document in 50
    texts = (json.dumps({"text": f"Another text about {k}. " * 20}) for k in range(400))
    other.write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(UserError, match=r"its train data was .*; its val data was "):
        run_stage("base_train", *argv, f"--data={other}", "--resume_from_step=3")


def test_resume_passes_over_a_damaged_checkpoint(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And comes to the same end from the one before."""
    argv = [*BASE_FLAGS, "--model_tag=damaged", "--save_every=2", "--keep_last=3"]
    run_stage("base_train", *argv)
    whole = weights("base", "damaged", 6)
    path = step_dir("base", "damaged", 6) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors was altered.*--resume_from_step=4\)"):
        run_stage("base_train", *argv, "--resume_from_step=6")
    run_stage("base_train", *argv, "--resume")
    said = capsys.readouterr()
    assert "step_000006 is damaged and passed over: model.safetensors was altered" in said.err
    assert "step_000004 at step 4, row 16 of the data" in said.out
    again = weights("base", "damaged", 6)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_change_can_be_allowed(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on under the new flags, and later resumes must have those."""
    argv = [*BASE_FLAGS, "--model_tag=changed", "--save_every=3"]
    run_stage("base_train", *argv)
    changed = [*argv, "--num_iterations=9", "--matrix_lr=0.01"]
    allowed = "--allow_changes=--num_iterations|--matrix_lr"
    run_stage("base_train", *changed, "--resume", allowed)
    assert "--matrix_lr was 0.02, now it is 0.01" in capsys.readouterr().err
    assert list_steps("base", "changed") == [6, 9] and len(losses("base", "changed")) == 9
    run_stage("base_train", *changed, "--resume")
    with pytest.raises(UserError, match=r"--matrix_lr was 0\.01, now it is 0\.02"):
        run_stage("base_train", *argv, "--num_iterations=9", "--resume")


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


def test_a_vocabulary_that_two_bytes_cannot_hold(base: Path) -> None:
    """--tokenizer=qwen2.5 from scratch, with more than 65,536 ids: they are kept in four bytes, the
    model has a row for each, and the checkpoint says which tokenizer it was."""
    tokenizer = big_qwen()
    tokenizer.save(base / "tokenizer_qwen2.5")
    before = set((base / "token_cache").rglob("*.bin"))
    run_stage(
        "base_train", *BASE_FLAGS, "--tokenizer=qwen2.5", "--arch=qwen2.5", "--depth=1",
        "--num_iterations=1", "--total_batch_size=128", "--eval_tokens=128", "--model_tag=big",
    )  # fmt: skip
    model, loaded, meta = load_model("base", "cpu", "big")
    assert model.config.vocab_size == tokenizer.get_vocab_size() == 256 + 65_536 + 5
    assert (meta["tokenizer"], loaded.fingerprint) == ("qwen2.5", tokenizer.fingerprint)
    cached = sorted(set((base / "token_cache").rglob("*.bin")) - before)
    ids = np.concatenate([np.fromfile(path, np.uint32) for path in cached])
    assert ids.max() == tokenizer.get_bos_token_id() > 65_535 and (ids > 255).mean() > 0.4


def test_pretraining_goes_on_with_another_tokenizer(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_qwen().save(base / "other")
    argv = [f"--tokenizer={base / 'other'}", "--source_tag=d2", "--model_tag=switched"]
    still = ["--num_iterations=1", "--embedding_lr=0", "--unembedding_lr=0", "--matrix_lr=0"]
    with pytest.raises(UserError, match="--retrain_embeddings"):
        run_stage("base_train", *BASE_FLAGS, *argv, *still)
    capsys.readouterr()
    argv = [flag for flag in (*BASE_FLAGS, *argv) if not flag.startswith("--depth")]
    run_stage("base_train", *argv, *still, "--retrain_embeddings")  # the shape is the source's
    assert re.search(r"of 400 rows \d+ are carried over", capsys.readouterr().out)
    old, new = (load_model("base", "cpu", tag)[0] for tag in ("d2", "switched"))
    assert new.config.vocab_size == 400 != old.config.vocab_size
    for name, weight in new.state_dict().items():
        rows = slice(0, 256) if weight.size(0) == 400 else slice(None)  # 0 to 255 are the bytes
        assert torch.equal(weight[rows], old.state_dict()[name][rows]), name
    with pytest.raises(UserError, match="needs a --source_tag"):
        run_stage("base_train", *BASE_FLAGS, "--retrain_embeddings")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_one_rank_resumes_what_two_saved_when_one_of_them_got_a_signal(base: Path) -> None:
    """Both ranks end with the same step, saved, and status 0."""
    argv = [*BASE_FLAGS, "--num_iterations=24", "--device_batch_size=1", "--eval_every=-1"]
    command = [*torchrun_command(2, "base_train"), *argv, "--model_tag=pair"]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "base step 1/" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    second = int(children.read_text(encoding="utf-8").split()[1])
    os.kill(second, signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert "stopped by a signal at step" in rest and "--resume" in rest
    (step,) = list_steps("base", "pair")
    assert 1 <= step < 24
    run_stage("base_train", *argv, "--model_tag=pair", "--resume")
    run_stage("base_train", *argv, "--model_tag=alone")
    assert losses("base", "pair") == pytest.approx(losses("base", "alone"), rel=1e-3)


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(base: Path) -> None:
    """While the save that the first one asked for is being written to a slow disk."""
    program = (
        "import sys, time; from nanochat import checkpoint, flags; from scripts import base_train\n"
        "checkpoint.save_file = lambda *args: time.sleep(60)\n"
        "flags.run(base_train.main, base_train.Args)"
    )
    argv = [*BASE_FLAGS, "--num_iterations=1000", "--model_tag=twice", "--eval_every=-1"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if "base step 3/" in line:
            break
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "Ctrl-C quits at once" in line:
            break
    started = time.monotonic()
    while not list((stage_dir("base") / "twice").glob(".step_*.tmp")):
        assert time.monotonic() - started < 30
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert list_steps("base", "twice") == []


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
        for name in ARCHITECTURES:
            run_stage("base_train", *golden_flags(name))
            curves[name] = losses("base", f"golden-{name}")
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
