"""Where runs begin: which checkpoint is resumed, and what must be as it was then."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import list_steps, stage_dir, step_dir
from nanochat.common import UserError
from nanochat.distributed import DistInfo
from nanochat.flags import FREE_ON_RESUME
from nanochat.start import Start, find_resumable, identity, load_base, refuse_changes, start_from
from scripts.base_train import Args
from tests.models_for_tests import tiny_model
from tests.scripts.checkpoints_for_tests import save_tiny

INFO = DistInfo(0, 0, 1, torch.device("cpu"))
META = {"tokenizer_fingerprint": "abc", "data": {"train": "t0", "val": "v0"}, "started_from": None}
FOLDER = Path("step_000003")


def describe(num_steps: int = 6, meta: dict[str, Any] = META, **flags: Any) -> dict[str, Any]:
    return identity(Args(**flags), tiny_model("gpt"), num_steps, meta)


# ---- what must be the same


def test_every_flag_is_compared_or_named_as_free() -> None:
    """A flag that somebody adds is compared until it is said to be free; none is free in vain."""
    known = set()
    for script in ("base_train", "mid_train", "chat_sft", "chat_rl"):
        args = importlib.import_module(f"scripts.{script}").Args
        known |= {field.name for field in fields(args)}
    assert known >= FREE_ON_RESUME
    compared = {f"--{name}" for name in known - FREE_ON_RESUME}
    assert compared >= {
        "--seed", "--total_batch_size", "--max_seq_len", "--matrix_lr", "--embedding_lr",
        "--unembedding_lr", "--weight_decay", "--grad_clip", "--warmup_steps", "--warmdown_ratio",
        "--final_lr_frac", "--init_lr_frac", "--examples_per_step", "--num_samples",
        "--max_new_tokens", "--temperature", "--top_k",
    }  # fmt: skip


def test_the_same_run_is_the_same() -> None:
    refuse_changes(FOLDER, describe(), describe(), "")
    free = {"device_batch_size": 4, "save_every": 9, "run": "name", "eval_every": 3, "resume": True}
    refuse_changes(FOLDER, describe(), describe(**free), "")
    # How the length was asked for does not matter, nor does a flag that came later.
    refuse_changes(FOLDER, describe(num_iterations=6), describe(target_flops=1e9), "")
    earlier = {name: value for name, value in describe().items() if name != "--grad_clip"}
    refuse_changes(FOLDER, earlier, describe(grad_clip=3.0), "")


def test_what_differs_is_named_all_of_it_with_the_way_out() -> None:
    now = describe(8, {**META, "data": {"train": "t1", "val": "v0"}}, seed=7)
    with pytest.raises(UserError) as e:
        refuse_changes(FOLDER, describe(), now, "")
    assert str(e.value) == (
        "cannot resume step_000003: its --seed was 42, now it is 7; its --num_iterations was 6, "
        "now it is 8; its train data was t0, now it is t1. Use the same as then, start a new run "
        'with another --model_tag, or say --allow_changes="--seed|--num_iterations|train data"'
    )


def test_a_change_is_allowed_by_its_name_only(capsys: pytest.CaptureFixture[str]) -> None:
    now = describe(8, seed=7)
    with pytest.raises(UserError, match=r"its --seed was 42, now it is 7\. Use"):
        refuse_changes(FOLDER, describe(), now, "--num_iterations")
    refuse_changes(FOLDER, describe(), now, " --num_iterations | --seed ")
    said = capsys.readouterr().err
    assert "--allow_changes" in said and "its --seed was 42, now it is 7" in said
    with pytest.raises(UserError, match=r"--sede is nothing that is compared; that is --seed, "):
        refuse_changes(FOLDER, describe(), describe(), "--sede")


# ---- which checkpoint


def test_the_newest_whole_one_is_resumed(own_base_dir: Path) -> None:
    assert find_resumable("base", "d4", Args(), INFO) is None
    for step in (10, 20, 30):
        save_tiny(own_base_dir, "base", "d4", step)
    assert find_resumable("base", "d4", Args(), INFO) is None  # nobody asked
    (stage_dir("base") / "d4" / ".step_000040.tmp").mkdir()
    found = find_resumable("base", "d4", Args(resume=True), INFO)
    assert found is not None and found[0].name == "step_000030" and found[1]["step"] == 30
    assert not (stage_dir("base") / "d4" / ".step_000040.tmp").exists()
    (step_dir("base", "d4", 30) / "meta.json").unlink()
    found = find_resumable("base", "d4", Args(resume=True), INFO)
    assert found is not None and found[0].name == "step_000020"


def test_a_run_without_a_checkpoint_starts_afresh_but_a_named_step_must_be_there(
    own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_resumable("base", "d4", Args(resume=True), INFO) is None
    assert "holds no checkpoint yet; starting afresh" in capsys.readouterr().out
    with pytest.raises(UserError, match="no base checkpoint with --model_tag=d4"):
        find_resumable("base", "d4", Args(resume_from_step=10), INFO)
    for step in (10, 20):
        save_tiny(own_base_dir, "base", "d4", step)
    with pytest.raises(UserError, match=r"has no step 15; it has \[10, 20\]"):
        find_resumable("base", "d4", Args(resume_from_step=15), INFO)
    found = find_resumable("base", "d4", Args(resume_from_step=10), INFO)
    assert found is not None and found[0].name == "step_000010"
    (step_dir("base", "d4", 20) / "optim.safetensors").unlink()
    message = "optim.safetensors is missing; .* --resume_from_step=10"
    with pytest.raises(UserError, match=message):
        find_resumable("base", "d4", Args(resume_from_step=20), INFO)
    assert list_steps("base", "d4") == [10, 20]


# ---- another run's checkpoint


def test_a_start_is_known_by_its_weights(own_base_dir: Path) -> None:
    def start() -> Start:
        return start_from("mid", None, RLArgs(), torch.device("cpu"))

    from scripts.chat_rl import Args as RLArgs

    save_tiny(own_base_dir, "mid", "d4", 10)
    first = start()
    assert first.name.startswith("mid d4 step_000010 (") and first.tag == "d4"
    assert start().name == first.name
    save_tiny(own_base_dir, "mid", "d5", 10)
    assert start().name.startswith("mid d5 step_000010 (")


def test_a_base_model_of_another_shape_is_refused(own_base_dir: Path) -> None:
    model = save_tiny(own_base_dir, "base", "d4")
    from nanochat.tokenizer import get_tokenizer

    other = tiny_model("gpt", seed=3, vocab_size=model.config.vocab_size, sequence_len=64)
    assert load_base("d4", other, get_tokenizer()).startswith("base d4 step_000007 (")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    with pytest.raises(UserError, match="but --arch and --depth ask for"):
        load_base("d4", tiny_model("qwen2.5"), get_tokenizer())
