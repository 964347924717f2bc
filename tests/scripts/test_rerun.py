"""Every stage's run is repeated from its folder, bit for bit; where it could not be, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat import distributed, flags
from nanochat.checkpoint import LOG, list_steps, run_dir, stage_dir, step_dir
from nanochat.common import UserError, read_jsonl
from nanochat.record import find_log, first_start, repeat_command
from scripts import rerun
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, RL_FLAGS, new_world, run_stage

SFT_FLAGS = [*MID_FLAGS, "--total_batch_size=256", "--source=base", "--num_iterations=3"]
STAGES = {
    "base": ("base_train", [*BASE_FLAGS, "--num_iterations=4"]),
    "mid": ("mid_train", [*MID_FLAGS, "--num_iterations=4"]),
    "sft": ("chat_sft", SFT_FLAGS),
    "rl": ("chat_rl", [*RL_FLAGS, "--num_iterations=2"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with one tiny run of every stage, all of tag d2."""
    with new_world(tmp_path_factory) as folder:
        for script, argv in STAGES.values():
            run_stage(script, *argv)
    return folder


@pytest.fixture(autouse=True)
def base(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared world; what rerun starts runs in this process."""

    def in_process(words: Sequence[str], environment: Mapping[str, str]) -> int:
        _, _, module, *argv = words
        run_stage(module.removeprefix("scripts."), *argv)
        return 0

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    monkeypatch.setattr(rerun, "launch", in_process)
    return world


def again(*argv: str) -> None:
    rerun.main(flags.parse(rerun.Args, list(argv)))


def tensors(stage: str, tag: str) -> dict[str, torch.Tensor]:
    folder = step_dir(stage, tag, list_steps(stage, tag)[-1])
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_repeated_from_its_folder_bit_for_bit(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses, and every bit of the weights and the optimizer's state. A newer base model
    does not become the start of a repeated finetuning."""
    if stage == "mid":
        run_stage("base_train", *BASE_FLAGS, "--num_iterations=1", "--model_tag=newer")
    again(f"{stage}/d2", "--go", "--tag=twin")
    losses = [row for _, row in read_jsonl(run_dir(stage, "d2") / LOG) if row["event"] == "step"]
    said = capsys.readouterr().out
    assert f"The losses of {len(losses)} steps are the same, bit for bit." in said
    assert "Code, versions and machine are as they were." in said
    one, two = tensors(stage, "d2"), tensors(stage, "twin")
    assert one.keys() == two.keys() and len(one) > 10
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_go_nothing_is_trained_and_what_changed_is_said(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = base / "elsewhere"
    shutil.copytree(run_dir("base", "d2"), moved)
    monkeypatch.setattr("nanochat.record.code_fingerprint", lambda: "other code")
    again(str(moved), "--tag=never")
    said = capsys.readouterr().out
    assert "code: fingerprint" in said and "other code" in said
    assert f"--model_tag=never --repeats={moved}" in said and "could begin" in said
    assert "Flags, data, tokenizer and starting weights are as they were." in said
    assert not run_dir("base", "never").exists()


def test_another_run_is_refused_before_its_first_step(base: Path) -> None:
    script, argv = STAGES["base"]
    other = base / "other.jsonl"  # enough for a row of validation: 1 document in 50
    texts = (json.dumps({"text": f"Another text {k}. " * 20}) for k in range(400))
    other.write_text("\n".join(texts), encoding="utf-8")
    changes = {
        "--seed=7": "--seed was 42, now it is 7",
        f"--data={other}": "train data",
        "--depth=1": "architecture and shape",
    }
    for flag, named in changes.items():
        with pytest.raises(UserError, match=f"cannot repeat .*its .*{named}"):
            run_stage(script, *argv, flag, "--model_tag=no", "--repeats=base/d2")
    assert not run_dir("base", "no").exists()
    with pytest.raises(UserError, match="would be replaced by its repetition"):
        run_stage(script, *argv, "--repeats=base/d2")


def test_a_run_that_comes_out_otherwise_is_named_with_its_first_step(tmp_path: Path) -> None:
    log = run_dir("base", "d2") / LOG
    changed = tmp_path / "changed" / LOG
    changed.parent.mkdir()
    lines = log.read_text(encoding="utf-8").splitlines()
    (at,) = (i for i, line in enumerate(lines) if '"step", "stage": "base", "step": 2,' in line)
    lines[at] = lines[at].replace('"loss": ', '"loss": 1')
    changed.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="the loss of step 2 was"):
        rerun.compare_losses(log, changed, "base")
    assert "4 steps are the same" in rerun.compare_losses(log, log, "base")


def test_what_the_first_row_of_a_log_holds() -> None:
    start = first_start(find_log("mid/d2"))
    assert start["typed"] == STAGES["mid"][1]  # as typed
    assert start["args"]["max_seq_len"] == 64 and start["args"]["seed"] == 42  # as resolved
    assert start["started_from"].startswith("base d2 step_000004 (")
    assert len(start["code"]["fingerprint"]) == 16 and start["versions"]["torch"]
    assert set(start["data"]) == {"train"} and len(start["tokenizer_fingerprint"]) == 16
    assert (start["world_size"], start["nodes"]) == (1, 1)
    assert start["threads"] == torch.get_num_threads()
    assert start["identity"]["starting checkpoint"] == start["started_from"]
    words = repeat_command(find_log("mid/d2"), "x")
    assert words[:3] == ["python", "-m", "scripts.mid_train"]
    assert {"--source_tag=d2", "--step=4", "--model_tag=x", "--device_batch_size=2"} < set(words)


def test_a_new_run_of_a_tag_leaves_the_old_one_repeatable() -> None:
    script, argv = STAGES["base"]
    run_stage(script, *argv, "--model_tag=twice", "--num_iterations=1")
    old = (run_dir("base", "twice") / LOG).read_text(encoding="utf-8")
    run_stage(script, *argv, "--model_tag=twice", "--num_iterations=2", "--keep_last=1")
    aside = stage_dir("base") / ".old" / "twice"
    assert (aside / LOG).read_text(encoding="utf-8") == old
    assert [p.name for p in aside.glob("step_*")] == ["step_000001"]
    assert find_log("base/.old/twice") == aside / LOG
    assert first_start(run_dir("base", "twice") / LOG)["num_steps"] == 2


# ---- --deterministic


def test_deterministic_is_switched_on_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU, where it changes nothing; and what a user has set is left alone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with distributed.session("cpu", 1, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    with pytest.raises(ZeroDivisionError), distributed.session("cpu", 1, deterministic=True):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_stage_trains_with_deterministic_algorithms() -> None:
    """No operation is used that PyTorch would refuse: on a CPU the losses are the same with it."""
    for stage in ("base", "rl"):
        script, argv = STAGES[stage]
        tag = "deterministic"
        source = ["--source_tag=d2"] if stage == "rl" else []
        run_stage(script, *argv, *source, f"--model_tag={tag}", "--deterministic")
        one, two = run_dir(stage, "d2") / LOG, run_dir(stage, tag) / LOG
        assert "same, bit for bit" in rerun.compare_losses(one, two, stage)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["base", "mid", "rl"])
def test_deterministic_runs_on_a_gpu_are_the_same_bits(stage: str) -> None:
    script, argv = STAGES[stage]
    argv = [flag for flag in argv if not flag.startswith("--device_type")]
    source = ["--source_tag=d2"] if stage != "base" else []
    for tag in ("gpu1", "gpu2"):
        run_stage(script, *argv, *source, "--device_type=cuda", "--deterministic",
                  f"--model_tag={tag}")  # fmt: skip
    one, two = tensors(stage, "gpu1"), tensors(stage, "gpu2")
    assert all(torch.equal(one[name], two[name]) for name in one)
