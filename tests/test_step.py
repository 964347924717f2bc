"""The training step: what it must never do, what it says, and how it recovers."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import compiling, step
from nanochat.checkpoint import LOG, list_steps, read_meta, run_dir, step_dir
from nanochat.common import UserError
from nanochat.compiling import Choice
from nanochat.dataloader import MicroBatch
from nanochat.meter import Meter
from nanochat.step import TrainStep, is_out_of_memory, memory_advice, out_of_memory
from nanochat.train import Trainer
from tests.test_train_saving import copy_of, drive, make_trainer, run, same, take_step


def rows(base_dir: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = (run_dir("base", "t") / LOG).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if event in ("", row["event"])]


def batches_of(trainer: Trainer, num: int, seed: int = 0) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    vocab = trainer.model.config.vocab_size
    ids = torch.randint(0, vocab, (num, 2, 9), generator=generator)
    return [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


# ---- what is logged


def test_rows_that_come_late_are_the_same_rows_in_the_same_order(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step's numbers are read when the next one is queued."""
    found = []
    for lag in (False, True):
        written: list[int] = []
        trainer = make_trainer(save_every=2)
        trainer.meter = Meter(trainer._account, lag)
        for _ in drive(trainer):
            written.append(len(rows(own_base_dir)))
        assert written == ([0, 0, 1, 2, 3] if lag else [0, 1, 2, 3, 4])
        found.append([
            {k: row.get(k) for k in ("event", "step", "loss", "grad_norm", "tokens", "val_loss")}
            for row in rows(own_base_dir, "")
        ])  # fmt: skip
        meta = read_meta(step_dir("base", "t", 2))
        before = run_dir("base", "t") / LOG
        log = before.read_bytes()[: meta["log_size"]].decode()
        assert [json.loads(line)["event"] for line in log.splitlines()][-2:] == ["step", "eval"]
        assert meta["state"]["tokens"] == 2 * 16
    assert found[0] == found[1]
    assert [row["step"] for row in found[0] if row["event"] == "step"] == [1, 2, 3, 4]


def test_a_late_row_is_before_the_save_that_a_signal_asks_for(own_base_dir: Path) -> None:
    trainer = make_trainer(save_every=-1, eval_every=-1)
    trainer.meter = Meter(trainer._account, lag=True)
    with pytest.raises(SystemExit):
        for at in drive(trainer):
            trainer._stop_signal = int(at == 1)
    (saved,) = list_steps("base", "t")
    meta = read_meta(step_dir("base", "t", saved))
    assert saved == 2 and [row["step"] for row in rows(own_base_dir)] == [1, 2]
    assert meta["log_size"] == (run_dir("base", "t") / LOG).stat().st_size


def test_tokens_per_second_are_all_tokens_of_a_step_by_its_time(own_base_dir: Path) -> None:
    """Under accumulation too (karpathy/nanochat #175)."""
    trainer = make_trainer()
    for num in (1, 4):
        trainer.step(batches_of(trainer, num), 1.0)
    first, second = rows(own_base_dir)
    assert (first["tokens"], second["tokens"]) == (16, 16 + 64)
    seconds = second["seconds"] - first["seconds"]
    assert second["tokens_per_second"] == pytest.approx(64 / seconds)
    assert trainer.state.seconds == pytest.approx(second["seconds"])
    assert 0.05 < first["memory_gib"] <= second["memory_gib"] < 100  # of this process, so far


def test_mfu_is_of_the_peak_of_all_ranks() -> None:
    trainer = make_trainer()
    assert trainer.train_step.mfu(1e6) is None  # nobody knows a CPU's peak
    trainer.train_step.peak_flops = 1e12
    expected = trainer.model.flops_per_token() * 1e5 / 1e12
    assert trainer.train_step.mfu(1e5) == pytest.approx(expected)


def test_the_start_row_says_how_it_computes(
    own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_trainer())
    (row,) = rows(own_base_dir, "start")
    assert (row["dtype"], row["compiled"]) == ("float32", False)
    assert "computing in float32 (the safe choice on cpu), eager (" in capsys.readouterr().out


# ---- what a step does


def test_a_step_without_a_trained_token_changes_nothing(own_base_dir: Path) -> None:
    trainer = make_trainer(weight_decay=0.1)
    take_step(trainer)
    before = copy_of(trainer)
    (batch,) = batches_of(trainer, 1)
    trainer.step([MicroBatch(batch.idx, torch.full_like(batch.targets, -1))], 1.0)
    trainer.step([], 1.0)
    assert same(copy_of(trainer), before) and trainer.optimizer.num_steps == 1
    assert [(r["loss"], r["grad_norm"]) for r in rows(own_base_dir)[1:]] == [(0, 0), (0, 0)]
    assert trainer.state.step == 3


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved() -> None:
    """Also if the optimizer does not look, and the numbers come late."""
    trainer = make_trainer()
    trainer.meter = Meter(trainer._account, lag=True)
    trainer.optimizer.step = lambda *args: torch.tensor(float("nan"))  # type: ignore[method-assign]
    take_step(trainer)
    with pytest.raises(UserError, match=r"gradient of step 1 has norm nan; lower --matrix_lr"):
        trainer.save()
    assert list_steps("base", "t") == []


def test_float16_s_scale_changes_nothing_but_the_overflow(own_base_dir: Path) -> None:
    plain, scaled = make_trainer(), make_trainer()
    scaled.train_step.scaler.enabled = True
    for trainer in (plain, scaled):
        take_step(trainer)
        trainer.state.step = 0
    for name, tensor in copy_of(plain).items():
        torch.testing.assert_close(copy_of(scaled)[name], tensor)
    before = copy_of(scaled)
    scaled.train_step.scaler.scale = 3e38  # times any gradient above 1.1: infinite
    scaled.step(batches_of(scaled, 1), 1.0)
    assert same(copy_of(scaled), before)
    assert scaled.train_step.scaler.scale == 1.5e38
    row = rows(own_base_dir)[-1]
    assert row["skipped"] and row["grad_norm"] == 0 and row["loss_scale"] == 1.5e38
    scaled.save()
    scaled._wait_for_save()
    assert read_meta(step_dir("base", "t", 1))["loss_scale"] == {"scale": 1.5e38, "good_steps": 0}


def test_the_collector_is_restored_when_a_run_ends_and_when_it_fails() -> None:
    run(make_trainer())
    assert gc.isenabled() and gc.get_freeze_count() == 0

    def fails() -> None:
        for at in drive(make_trainer()):
            assert gc.isenabled() == (at == 0)
            if at == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.isenabled()


# ---- compiled


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as far as a compiler's work begins, which would take minutes."""
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(compiling.torch, "compile", compiled)
    monkeypatch.setattr(step, "choose_compile", lambda *args: Choice(True, "for this test"))


def test_a_compiled_step_compiles_once(traced: None) -> None:
    """Whatever the rates do, and whatever is evaluated in between."""
    from torch._dynamo.utils import counters

    plain = make_trainer(compile="off")
    plain.train_step.forward = plain.model
    trainer = make_trainer()
    counters.clear()
    graphs = []
    for k in range(5):
        for each in (plain, trainer):
            each.step(batches_of(each, 2, seed=k), 1.0 / (k + 1), 0.9 + 0.01 * k)
        trainer.model.eval()
        with torch.no_grad():
            trainer.model(torch.zeros(1, k + 1, dtype=torch.int64))
        trainer.model.train()
        graphs.append(counters["stats"]["unique_graphs"])
    # One of the model, and of the optimizer one for each shape and kind of parameters
    assert graphs == [graphs[0]] * 5 and 1 < graphs[0] < 10
    for name, tensor in copy_of(plain).items():
        torch.testing.assert_close(copy_of(trainer)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_model_that_does_not_compile_is_trained_without(
    wanted: str, traced: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("no kernel for this\nand more")

    plain = make_trainer()
    plain.train_step.forward = plain.model
    trainer = make_trainer(compile=wanted)
    monkeypatch.setattr(trainer.train_step.forward, "parts", [(trainer.model, "hidden", fails)])
    if wanted == "on":
        with pytest.raises(NotImplementedError):
            take_step(trainer)
        return
    for _ in range(2):
        take_step(trainer)
        take_step(plain)
    assert same(copy_of(trainer), copy_of(plain))
    assert capsys.readouterr().err.count("NotImplementedError: no kernel for this)") == 1


# ---- memory


def out_of_memory_at(trainer: Trainer, number: int, error: Exception) -> None:
    forward = trainer.train_step.forward

    def fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.step + 1 == number:
            raise error
        return forward(*args, **kwargs)

    trainer.train_step.forward = fails


CUDA_SAID = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"


def test_out_of_memory_says_what_to_set_and_what_is_left() -> None:
    trainer = make_trainer(save_every=2)
    out_of_memory_at(trainer, 4, torch.OutOfMemoryError(CUDA_SAID))
    with pytest.raises(UserError) as e:
        run(trainer)
    said = str(e.value)
    assert "in step 4, with micro-batches of 2 rows of 8 tokens" in said
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert "--device_batch_size=1" in said and "--activation_checkpointing" in said
    assert "checkpoint of step 2 is intact: continue with --resume" in said
    assert list_steps("base", "t") == [2]
    run(make_trainer(save_every=2, resume=True))
    assert list_steps("base", "t") == [2, 4]


def test_out_of_memory_before_any_checkpoint() -> None:
    trainer = make_trainer(save_every=-1)
    out_of_memory_at(trainer, 1, torch.OutOfMemoryError(CUDA_SAID))
    with pytest.raises(UserError, match="No checkpoint has been saved yet: start again"):
        run(trainer)
    assert list_steps("base", "t") == []


def test_only_memory_is_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (allocated 9 GB)"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
    trainer = make_trainer()
    out_of_memory_at(trainer, 1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        take_step(trainer)
    assert "--device_batch_size=8 " in memory_advice(16).replace(",", " ")
    assert "--device_batch_size" not in memory_advice(1)


def test_the_largest_micro_batch_is_named() -> None:
    sizes = [(2, 5), (2, 9), (1, 9)]
    batches = [MicroBatch(torch.zeros(size), torch.zeros(size)) for size in sizes]
    assert "2 rows of 9 tokens" in str(out_of_memory(RuntimeError("x"), 1, batches, None))


# ---- on a GPU


@pytest.mark.gpu
def test_a_gpu_s_step_is_queued_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the step waits for the queue to empty (the optimizer is tested on its own)."""
    from nanochat.distributed import DistInfo

    trainer = make_trainer(compile="off")
    device = torch.device("cuda", 0)
    model = trainer.model.to(device)
    model.rotary.fill()
    taken = TrainStep(trainer.args, DistInfo(0, 0, 1, device), model, trainer.optimizer)
    monkeypatch.setattr(trainer.optimizer, "step", lambda *args: torch.ones((), device=device))
    batches = [MicroBatch(b.idx.to(device), b.targets.to(device)) for b in batches_of(trainer, 2)]
    taken.take(1, batches, (1.0, 0.95, 1.0), False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = taken.take(2, batches, (1.0, 0.95, 1.0), False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, norm = record.numbers.read()
    assert loss > 0 and norm == 1 and record.tokens == 32
