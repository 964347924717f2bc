"""
Saving while training goes on: what is in the files, who waits for whom, and who hears of errors.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint, train
from nanochat.checkpoint import LOG, list_steps, read_meta, run_dir, step_dir
from nanochat.common import UserError, append_jsonl
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo
from nanochat.flags import TrainFlags
from nanochat.optim import make_optimizer
from nanochat.step import TrainStep
from nanochat.train import Trainer
from tests.models_for_tests import tiny_model

NUM_STEPS = 4


def make_trainer(**flags: Any) -> Trainer:
    """A run of 4 steps with a tiny model; tag "t"."""
    model = tiny_model("gpt", seed=1)
    args = TrainFlags(**{"eval_every": 2, "save_every": 1, "keep_last": -1, **flags})
    meta = {"tokenizer": None, "tokenizer_fingerprint": "abc", "data": {"train": "t0"}}
    info = DistInfo(0, 0, 1, torch.device("cpu"))
    optimizer = make_optimizer(model, args.embedding_lr, args.unembedding_lr, args.matrix_lr)
    return Trainer("base", "t", TrainStep(args, info, model, optimizer), NUM_STEPS, meta)


def take_step(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(trainer.state.step)
    idx = torch.randint(0, trainer.model.config.vocab_size, (2, 9), generator=generator)
    trainer.step([MicroBatch(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())], 1.0)


def drive(trainer: Trainer) -> Iterator[int]:
    """A stage's script in small: an evaluation, a save, a step."""
    for step in trainer.steps():
        yield step
        if trainer.is_due(trainer.args.eval_every, at_start=True):
            trainer.record(val_loss=float(step))
        if trainer.is_due(trainer.args.save_every):
            trainer.save()
        if step < NUM_STEPS:
            take_step(trainer)


def run(trainer: Trainer) -> None:
    for _ in drive(trainer):
        pass


def tensors(step: int) -> dict[str, torch.Tensor]:
    folder = step_dir("base", "t", step)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}


def copy_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    both = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: tensor.clone() for name, tensor in both.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class SlowDisk:
    """Takes the place of save_file: nothing is written until `go`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.writing = self.most = 0
        patch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        self.begun.set()
        assert self.go.wait(30)
        save_file(tensors, path)
        self.writing -= 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


# ---- in the background


def test_training_goes_on_while_a_save_is_written(disk: SlowDisk) -> None:
    """And what is written is what was there when it was asked for."""
    trainer = make_trainer()
    take_step(trainer)
    then = copy_of(trainer)
    trainer.save()
    assert disk.begun.wait(30)
    take_step(trainer)
    take_step(trainer)
    assert list_steps("base", "t") == []
    assert not same(copy_of(trainer), then)
    disk.go.set()
    trainer._wait_for_save()
    assert list_steps("base", "t") == [1]
    assert same(tensors(1), then)
    meta = read_meta(step_dir("base", "t", 1))
    assert (meta["step"], meta["state"]["step"], meta["optimizer_steps"]) == (1, 1, 1)


def test_the_next_save_waits_for_the_one_in_flight(disk: SlowDisk) -> None:
    trainer = make_trainer()
    take_step(trainer)
    trainer.save()
    take_step(trainer)
    second = threading.Thread(target=trainer.save)
    second.start()
    second.join(0.3)
    assert second.is_alive() and disk.most == 1
    disk.go.set()
    second.join(30)
    trainer._wait_for_save()
    assert disk.most == 1 and list_steps("base", "t") == [1, 2]


def test_the_end_of_a_run_waits_for_its_last_save(disk: SlowDisk) -> None:
    threading.Timer(0.3, disk.go.set).start()
    run(make_trainer(save_every=-1))
    assert list_steps("base", "t") == [NUM_STEPS]


def test_an_error_waits_for_the_save_in_flight(disk: SlowDisk) -> None:
    threading.Timer(0.3, disk.go.set).start()

    def fails(trainer: Trainer) -> None:
        for step in drive(trainer):
            if step == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails(make_trainer())
    assert list_steps("base", "t") == [1]


def test_nothing_is_saved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_trainer())
    monkeypatch.setattr(checkpoint, "save_file", None)  # calling it would fail
    trainer = make_trainer(resume=True)
    run(trainer)
    trainer.save()
    assert list_steps("base", "t") == [1, 2, 3, 4]


# ---- a disk that is full


def full_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if f"step_{step:06d}" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", write)


def test_a_save_that_fails_ends_the_run_soon_and_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_from(2, monkeypatch)
    trainer = make_trainer()
    with pytest.raises(UserError, match=r"No space left .* needs 0\.\d\d MB and .* [GM]B are free"):
        run(trainer)
    assert trainer.state.step == 3  # the first opportunity, or the next save
    assert list_steps("base", "t") == [1]
    assert not list(step_dir("base", "t", 2).parent.glob(".*"))
    monkeypatch.undo()


def test_a_last_save_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    full_from(NUM_STEPS, monkeypatch)
    with pytest.raises(UserError, match="No space left"):
        run(make_trainer(save_every=-1))


def test_after_another_error_a_failed_save_is_at_least_mentioned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_from(1, monkeypatch)
    trainer = make_trainer()

    def fails() -> None:
        for step in trainer.steps():
            if step == 1:
                trainer.save()
                raise ZeroDivisionError
            take_step(trainer)

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "No space left" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, own_base_dir: Path
) -> None:
    def fails(path: Path, row: dict[str, Any]) -> None:
        if row["event"] == "step" and row["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append_jsonl(path, row)

    run(make_trainer(run="dummy"))
    whole = tensors(NUM_STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(train, "append_jsonl", fails)
        with pytest.raises(UserError, match=r"t.log\.jsonl.* No space left .* --resume"):
            run(make_trainer())
    assert list_steps("base", "t") == [1, 2]
    run(make_trainer(resume=True))
    assert same(tensors(NUM_STEPS), whole)


# ---- signals


def test_a_signal_ends_the_run_after_the_step_and_a_second_ctrl_c_is_not_caught() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(save_every=-1)
    with pytest.raises(SystemExit) as e:
        for step in drive(trainer):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
                assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # dies, without Python
    assert e.value.code == 0
    assert trainer.state.step == 2 and list_steps("base", "t") == [2]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_evaluation_is_broken_off_and_made_again(own_base_dir: Path) -> None:
    trainer = make_trainer(save_every=-1)
    seen: list[int] = []
    with pytest.raises(SystemExit):
        for step in trainer.steps():
            if step == 2:
                trainer.log("eval", first=1)  # one of two evaluations is done
                for batch in trainer.until_stopping(range(100)):
                    seen.append(batch)
                    if batch == 5:
                        signal.raise_signal(signal.SIGTERM)
                trainer.record(val_loss=-1.0)
            take_step(trainer)
    assert seen == [*range(6)] and "val_loss" not in trainer.metrics
    assert list_steps("base", "t") == [2]
    assert not read_meta(step_dir("base", "t", 2))["events_done"]
    run(make_trainer(save_every=-1, resume=True))
    log = run_dir("base", "t") / LOG
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(row["event"], row["step"]) for row in rows] == [
        ("start", 0), ("step", 1), ("step", 2), ("start", 2), ("eval", 2), ("step", 3),
        ("step", 4), ("eval", 4), ("end", 4),
    ]  # fmt: skip


# ---- what a resumed run finds


def test_a_resumed_run_repeats_no_evaluation_and_keeps_no_later_row(own_base_dir: Path) -> None:
    run(make_trainer())
    log = run_dir("base", "t") / LOG
    with open(log, "a", encoding="utf-8") as f:
        f.write('{"event": "step", "st')  # as a kill may leave it
    trainer = make_trainer(resume_from_step=2)
    trainer.metrics["val_loss"] = -1.0
    run(trainer)
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(row["event"], row["step"]) for row in rows] == [
        ("start", 0), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2),
        ("start", 2), ("step", 3), ("step", 4), ("eval", 4), ("end", 4),
    ]  # fmt: skip
    assert trainer.metrics == {"val_loss": 4.0}
    # What was saved after step 2 was moved aside, and has been saved anew
    assert list_steps("base", "t") == [1, 2, 3, 4]
    old = step_dir("base", "t", 2).parent.parent / ".old" / "t"
    assert sorted(p.name for p in old.iterdir()) == ["step_000003", "step_000004"]


def test_a_run_must_not_start_from_its_own_tag() -> None:
    with pytest.raises(UserError, match=r"--model_tag=t is what this run starts from"):
        trainer = make_trainer()
        meta = {**trainer.meta, "started_from": "base t step_000004 (abc)"}
        Trainer("base", "t", trainer.train_step, 4, meta)


def test_wandb_goes_on_with_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told the step as a value: its own count would drop the steps that are taken again."""
    inits: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def init(**kwargs: Any) -> Any:
        inits.append(kwargs)
        return SimpleNamespace(
            id=kwargs["id"] or "new-id", log=rows.append, finish=lambda: None,
            define_metric=lambda name, step_metric: None,
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(make_trainer(run="name"))
    run(make_trainer(run="name", resume_from_step=2))
    assert [(kwargs["id"], kwargs["resume"]) for kwargs in inits] == [
        (None, "allow"), ("new-id", "allow"),
    ]  # fmt: skip
    assert [row["step"] for row in rows if "step/loss" in row] == [1, 2, 3, 4, 3, 4]


# ---- several ranks


@pytest.mark.parametrize("another_failed", [False, True])
def test_what_torchrun_ends_for_another_rank_s_failure_does_not_speak_of_stopping(
    another_failed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """That failure is what one must see."""
    monkeypatch.setattr(train.rank_log, "another_failed", lambda: another_failed)
    trainer = make_trainer()
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer._on_signal(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.stopping()
    assert ("stopping" in capfd.readouterr().err) != another_failed
