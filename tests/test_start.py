"""Where runs begin: which checkpoint is resumed, what must be as it was, what is taken over."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import (
    list_steps,
    load_weights,
    read_meta,
    save_checkpoint,
    stage_dir,
    step_dir,
)
from nanochat.common import UserError
from nanochat.distributed import DistInfo
from nanochat.flags import InheritedFlags
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.start import (
    FREE_ON_RESUME,
    Start,
    continued_optimizer,
    find_resumable,
    identity,
    inherit,
    load_base,
    lr_frac,
    refuse_changes,
    start_from,
)
from scripts.base_train import Args
from tests.models_for_tests import tiny_model, tokens_of
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
    # How much is evaluated decides nothing
    assert not {f"--eval_{what}" for what in ("every", "tokens", "examples", "samples")} & compared


def test_the_same_run_is_the_same() -> None:
    refuse_changes(FOLDER, describe(), describe(), "")
    free = {"device_batch_size": 4, "save_every": 9, "run": "name", "eval_every": 3, "resume": True}
    refuse_changes(FOLDER, describe(), describe(**free), "")
    # How the length was asked for does not matter, nor does a flag that came later.
    for horizon in ("target_flops", "target_tokens", "target_param_data_ratio"):
        refuse_changes(FOLDER, describe(num_iterations=6), describe(**{horizon: 1e9}), "")
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


# ---- what is taken over from it


def trained(stage: str = "base", arch: str = "gpt", **meta: Any) -> Start:
    """A checkpoint's metadata, with a model of rows of 16 tokens."""
    return Start(
        tiny_model(arch), None, {"stage": stage, **meta}, "d4", f"{stage} d4", Path("nowhere")
    )


def taken_over(start: Start, **typed: Any) -> list[float]:
    """Row length, batch, the three rates and the decay."""
    args = InheritedFlags(**typed)
    inherit(args, start)
    names = ("max_seq_len", "total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr")
    return [getattr(args, name) for name in (*names, "weight_decay")]


ARGS = {"max_seq_len": 99, "total_batch_size": 1024, "embedding_lr": 0.3, "unembedding_lr": 0.02,
        "matrix_lr": 0.04, "weight_decay": 0.1}  # fmt: skip


def test_typed_before_trained_before_default(capsys: pytest.CaptureFixture[str]) -> None:
    start = trained(args=ARGS)
    assert taken_over(start) == [16, 1024, 0.3, 0.02, 0.04, 0.1]
    assert capsys.readouterr().out == (
        "as the model was trained: --max_seq_len=16 --total_batch_size=1024 --embedding_lr=0.3 "
        "--unembedding_lr=0.02 --matrix_lr=0.04 --weight_decay=0.1\n"
    )
    typed = {"max_seq_len": 8, "total_batch_size": 64, "embedding_lr": 0.0, "weight_decay": 0.0}
    assert taken_over(start, **typed) == [8, 64, 0.0, 0.02, 0.04, 0.0]  # 0 is a value
    capsys.readouterr()
    some = {name: ARGS[name] for name in ("embedding_lr", "total_batch_size")}
    assert taken_over(trained(args={**some, "matrix_lr": -1})) == [16, 1024, 0.3, 0.004, 0.02, 0.0]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "as the model was trained: --max_seq_len=16 --total_batch_size=1024 --embedding_lr=0.3",
        "the checkpoint does not say, so by default: --unembedding_lr=0.004 --matrix_lr=0.02 "
        "--weight_decay=0",
    ]
    taken_over(trained(args={**ARGS, "total_batch_size": 2**20}))
    assert "--total_batch_size=1048576 " in capsys.readouterr().out


def test_rates_are_those_of_the_peak() -> None:
    """base_train's --init_lr_frac is part of it; that of mid and SFT, for what came after, is
    not: or the rates would shrink from stage to stage."""
    args = {**ARGS, "init_lr_frac": 0.5, "final_lr_frac": 0.0}
    assert taken_over(trained(args=args))[2:] == [0.15, 0.01, 0.02, 0.1]
    for stage in ("mid", "sft"):
        assert taken_over(trained(stage, args=args))[2:] == [0.3, 0.02, 0.04, 0.1]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_an_import_goes_on_at_a_tenth(stage: str) -> None:
    start = trained(stage, args={}, imported={"from": "there"})
    expected = [16, 65_536, 0.02, 0.0004, 0.002, 0.0]
    assert taken_over(start) == pytest.approx(expected)
    assert taken_over(start, matrix_lr=0.5)[4] == 0.5
    assert lr_frac(-1, start.meta) == 0.1 and lr_frac(0.7, start.meta) == 0.7
    assert lr_frac(-1, trained(args=ARGS).meta) == lr_frac(-1, None) == 1.0
    assert lr_frac(0.0, None) == 0.0


def learner() -> tuple[Any, MuonAdamW]:
    """A tiny model and its optimizer, both always the same."""
    model = tiny_model("qwen2.5")  # it has vectors too
    return model, make_optimizer(model, 0.1, 0.01, 0.02)


def learn(model: Any, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        tokens = tokens_of(model, 2, 9, seed=step)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step(1.0)
        optimizer.zero_grad()


def state_of(optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    return {**optimizer.state_dict(), "steps": torch.tensor(optimizer.num_steps)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved_after(
    steps: int, stage: str = "base", drop: Sequence[str] = (), **meta: Any
) -> tuple[Any, MuonAdamW, Start]:
    """A model and its optimizer after so many steps, and their checkpoint, without the entries of
    the state that end in `drop`."""
    model, optimizer = learner()
    learn(model, optimizer, range(steps))
    state = {k: v for k, v in optimizer.state_dict().items() if not k.endswith(tuple(drop))}
    meta = {"stage": stage, "optimizer_steps": optimizer.num_steps, **meta}
    folder = save_checkpoint(stage, "d4", steps, model, state, meta)
    return model, optimizer, Start(None, None, read_meta(folder), "d4", f"{stage} d4", folder)


def continued(start: Start, model: Any, args: InheritedFlags) -> MuonAdamW:
    make = partial(make_optimizer, model, 0.1, 0.01, 0.02)
    return continued_optimizer(make, args, start, torch.device("cpu"))


def test_a_warm_start_goes_on_to_the_bit(capsys: pytest.CaptureFixture[str]) -> None:
    """Momentum, second moments, and the steps that their bias is corrected by."""
    model, optimizer, start = saved_after(3)
    again, _ = learner()
    load_weights(start.folder, again)
    warm = continued(start, again, InheritedFlags())
    assert capsys.readouterr().out == "optimizer: warm start, with the state after 3 steps\n"
    assert same(state_of(warm), state_of(optimizer)) and warm.num_steps == 3
    for each in ((model, optimizer), (again, warm)):
        learn(*each, range(3, 5))
    assert same(state_of(warm), state_of(optimizer))
    assert same(again.state_dict(), model.state_dict())


def last_entry() -> str:
    """Of the last parameter's state, whatever it is called."""
    model, optimizer = learner()
    learn(model, optimizer, range(1))
    return list(optimizer.state_dict())[-1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"drop": [""]}, r"step_000003 has no optimizer state "),  # none at all
        ({"drop": ["last"]}, r"step_000003 has no optimizer state .*/"),  # an older kind's
        ({"imported": {"from": "x"}}, "step_000003 was imported, without one"),
        ({"stage": "rl"}, "RL's is of other gradients"),
        ({"load_optimizer": 0}, "--load_optimizer=0"),
    ],
)
def test_a_cold_start_is_one_and_says_why(
    changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left of a state that was read in part."""
    if changes.get("drop") == ["last"]:
        changes = {"drop": [last_entry()]}
    args = InheritedFlags(load_optimizer=changes.pop("load_optimizer", 1))
    _, _, start = saved_after(3, **changes)
    model, new = learner()
    cold = continued(start, model, args)
    said = capsys.readouterr().out
    assert re.fullmatch(rf"optimizer: cold start \(.*{reason}.*\)\n", said), said
    assert cold.num_steps == 0 and same(state_of(cold), state_of(new))
    other, _ = learner()
    learn(model, cold, range(2))
    learn(other, make_optimizer(other, 0.1, 0.01, 0.02), range(2))
    assert same(model.state_dict(), other.state_dict())


def test_what_one_rank_lacks_all_go_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, start = saved_after(3)
    monkeypatch.setattr("nanochat.start.sum_over_ranks", lambda *values, device: [1.0])
    assert continued(start, learner()[0], InheritedFlags()).num_steps == 0
    assert "cold start (not all ranks could read its state)" in capsys.readouterr().out
